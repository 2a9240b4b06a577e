"""`python -m fedsafe`, for launchers such as torchrun."""

import sys

from fedsafe.cli import main

sys.exit(main())
