"""The app that travels from the server to the nodes with a run: a name, and no code.

Flower lets a server send code that its nodes then run. Ours names a module of the fedsafe that each
node has installed, and a node refuses a bundle that holds anything else.
"""

import io
import tomllib
import zipfile
import zlib

from flwr.cli.build import build_fab_from_files

PYPROJECT = "pyproject.toml"
CLIENT_APP = "fedsafe.federated.flower.client_app:app"
SERVER_APP = "fedsafe.federated.flower.server_app:app"

_TEXT = f"""\
[project]
name = "fedsafe-app"
version = "1.0.0"
description = "Federated fine-tuning that stays safe"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedsafe"
fab-include = ["{PYPROJECT}"]

[tool.flwr.app.components]
serverapp = "{SERVER_APP}"
clientapp = "{CLIENT_APP}"

[tool.flwr.app.config]
arguments = "[]"
cwd = "."
state = ""
"""
_COMPONENTS = {"serverapp": SERVER_APP, "clientapp": CLIENT_APP}
_OTHERS = {".info/CONTENT"}
"""What Flower adds: the list of the files."""

_MOST_BYTES = 65_536
"""Of the text: a few bytes may unpack to as many as memory holds."""
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,  # encrypted, packed in an unknown way, or nested too deep
    KeyError,
    TypeError,
    UnicodeError,
    tomllib.TOMLDecodeError,
)


def build_bundle() -> bytes:
    """The app as Flower packs it."""
    return build_fab_from_files({PYPROJECT: _TEXT.encode()})[0]


def check_bundle(content: bytes) -> None:
    """Refuse a bundle that is not ours.

    Raises:
        ValueError: If it holds code, or names another app for the node to run.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = set(archive.namelist())
            size = archive.getinfo(PYPROJECT).file_size
            if size > _MOST_BYTES:
                raise ValueError(f"{PYPROJECT} of what the server sent takes {size:,} bytes")
            project = tomllib.loads(archive.read(PYPROJECT).decode())
        components = project["tool"]["flwr"]["app"]["components"]
    except _UNREADABLE:
        raise ValueError("what the server sent is no app of Flower's") from None
    if unknown := names - {PYPROJECT} - _OTHERS:
        raise ValueError(
            f"the server sent code of its own ({len(unknown)} files, the first is "
            f"{min(unknown)!r}); this node runs nothing but its own fedsafe"
        )
    if components != _COMPONENTS:  # more would be another kind of app for Flower to run here
        raise ValueError(
            f"the server asks for {components!r}; this node runs nothing but {_COMPONENTS!r}"
        )
