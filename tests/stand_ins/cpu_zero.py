"""ZeRO on CPUs and gloo: DeepSpeed runs there, Lightning and our own strategy refuse to."""

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy

from fedsafe.strategies.zero import ZeroStrategy


class CPUZeroStrategy(ZeroStrategy):
    """See the module."""

    def setup_environment(self) -> None:
        """As under DDP."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """As Lightning does, without a look at the numbers of the devices."""
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        """DeepSpeed wants a number."""
        return torch.device("cpu", 0)
