"""`ZeroStrategy`: DeepSpeed's ZeRO inside a client.

The ranks train one client together. ZeRO-1 and ZeRO-2 split what the optimizer remembers (and the
gradients) of the adapter; ZeRO-3 splits the base too, and brings each layer together when it is
needed. As the adapter is small, ZeRO-1 and ZeRO-2 save little; ZeRO-3 is for a base that is too
large for one GPU.

References:
    Rajbhandari et al. (2020), ZeRO: Memory Optimizations Toward Training Trillion Parameter Models.
    https://arxiv.org/abs/1910.02054
"""

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy
from peft import PeftModel
from torch import Tensor, nn

from fedsafe.model.flat_adapter import FlatAdapter, WholeAdapter
from fedsafe.model.partitioned_adapter import FullyPartitionedAdapter, PartlyPartitionedAdapter
from fedsafe.model.partitioned_load import (
    build_partitioned,
    drops_frozen_weights,
    require_gradients,
)
from fedsafe.peers import ALONE, Peers
from fedsafe.strategies.layout import LaidOut, Layout
from fedsafe.strategies.one_file import OneFileCheckpoints

Stage = Literal[1, 2, 3]
Offload = Literal["none", "optimizer", "parameters"]

_BUCKET = 16_000_000
"""Gradients that travel together: 64 MB in float32."""


class ZeroPrecision(DeepSpeedPrecision):
    """The adapter, its gradients and the optimizer stay in float32, as under every other strategy.

    DeepSpeed's own mixed precision would keep a bfloat16 adapter beside the float32 one, and
    Lightning's plugin would round what is in a batch.
    """

    def __init__(self, precision: Any, *, device_type: str = "cuda") -> None:
        if precision not in ("32-true", "bf16-mixed"):
            raise ValueError(
                f"Trainer(precision={precision!r}) cannot run under ZeRO; give 'bf16-mixed' or "
                "'32-true', and the base's type as model.dtype"
            )
        super().__init__(precision)
        self._device_type = device_type

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Leave a bfloat16 base as narrow as it is; Lightning's plugin would make it float32."""
        return module

    def convert_input(self, data: Any) -> Any:
        """Leave batches as they are."""
        return data

    def forward_context(self) -> AbstractContextManager[Any]:
        """What is computed in bfloat16 is torch's choice."""
        if self.precision == "32-true":
            return nullcontext()
        return torch.autocast(self._device_type, dtype=torch.bfloat16, cache_enabled=False)

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Lightning has divided by the number of accumulated batches already."""
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class ZeroStrategy(LaidOut, OneFileCheckpoints, DeepSpeedStrategy):
    """All ranks train one client together, with DeepSpeed's ZeRO.

    Args:
        stage: 1 splits the optimizer's memory of the adapter over the ranks, 2 the gradients too, 3
            also the base and the adapter.
        offload: What is kept in the host's memory: `none`, the `optimizer`'s part, or all
            `parameters` too (stage 3 alone).
        prefetch_elements: Parameters that stage 3 brings together before they are needed, about
            those of a layer; 0 for the least memory.
        timeout: How long a rank waits for the others, such as 0:30:00, before the run ends.
        process_group_backend: How ranks speak; None takes nccl.

    Raises:
        ValueError: If DeepSpeed is missing, or parameters are to be offloaded that are not split.
    """

    def __init__(
        self,
        stage: Stage = 3,
        offload: Offload = "none",
        prefetch_elements: int = 200_000_000,
        timeout: timedelta = timedelta(minutes=30),
        process_group_backend: str | None = None,
    ) -> None:
        if offload == "parameters" and stage != 3:
            raise ValueError(
                f"ZeRO-{stage} keeps the parameters whole on each GPU and offloads the optimizer "
                "alone; give offload: optimizer, or stage: 3"
            )
        if find_spec("deepspeed") is None:
            raise ValueError("ZeRO needs DeepSpeed; pip install deepspeed")
        self.stage = stage
        super().__init__(
            config=_settings(stage, offload, prefetch_elements),
            timeout=timeout,
            process_group_backend=process_group_backend,
        )

    # ---- who does what ---------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """One client group; with stage 3 it holds one base together."""
        everyone = Peers(self.global_rank, self.world_size)
        replicas = ALONE if self.stage == 3 else everyone
        return Layout(data=everyone, replicas=replicas, world=everyone)

    def flat_adapter(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> FlatAdapter:
        """Access to the adapter; without an engine that trains, stages 1 and 2 split nothing."""
        zero = self.optimizers[0] if self.optimizers else None
        if zero is None and self.stage != 3:
            return WholeAdapter(named_parameters)
        kind = FullyPartitionedAdapter if self.stage == 3 else PartlyPartitionedAdapter
        return kind(named_parameters, zero=zero, peers=self.layout.world, device=self.root_device)

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        """Gather what stage 3 has split, on all ranks."""
        if self.stage != 3:
            return nullcontext()
        from deepspeed import zero

        # by name, as in module.weight, DeepSpeed would take note and keep them whole from now on
        own: list[Any] = list(module.parameters(recurse=False))
        absent = [each for each in own if each.ds_status.name != "AVAILABLE"]
        gathered: AbstractContextManager[None] = zero.GatheredParameters(absent)
        return gathered

    # ---- setting up ------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Precision:
        """Float32, or bfloat16 by torch's autocast."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, given: Precision | None) -> None:
        self._precision_plugin = None if given is None else ZeroPrecision(given.precision)

    def connect(self, model: LightningModule) -> None:
        """Refuse what DeepSpeed would do wrong or refuse after the base was loaded."""
        if model.trainer.gradient_clip_algorithm == "value":
            raise ValueError(
                "ZeRO clips gradients by their norm alone; leave gradient_clip_algorithm out"
            )
        if self.stage == 3 and model.hparams.get("quantize_4bit"):
            raise ValueError(
                "ZeRO-3 cannot split a base in 4 bits; take configs/strategy/ddp.yaml, or leave "
                "quantize_4bit out"
            )
        super().connect(model)

    def setup_environment(self) -> None:
        """Refuse other devices in our words, before anything is loaded."""
        if not torch.cuda.is_available():
            raise ValueError(
                "ZeRO needs a CUDA device and none is visible; take configs/strategy/ddp.yaml or "
                "clients.yaml on CPUs"
            )
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise ValueError(
                f"ZeRO needs CUDA devices and the Trainer has a {type(self.accelerator).__name__}; "
                "give --trainer.accelerator cuda, or take configs/strategy/ddp.yaml"
            )
        super().setup_environment()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Build the model as on one device; `build` splits it."""
        yield

    def build(self, make: Callable[[], PeftModel]) -> PeftModel:
        """The model; with stage 3 in parts, made by rank 0."""
        if self.stage != 3:
            return make()
        self._init_config_if_needed()
        settings, world = self._config, self.layout.world
        return build_partitioned(make, world, settings=settings, device=self.root_device)

    def setup(self, trainer: Trainer) -> None:
        """Hand the model to DeepSpeed."""
        model, precision = self.lightning_module, self.precision_plugin.precision
        assert model is not None
        self._precision_plugin = ZeroPrecision(precision, device_type=self.root_device.type)
        self._init_config_if_needed()
        if precision == "bf16-mixed":
            # an empty list: gradients and weights travel as they are, not in bfloat16
            autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            self._config["torch_autocast"] = autocast
        if self.stage == 3:
            model.to(self.root_device)  # buffers and metrics; parameters are there
        super().setup(trainer)
        if self.stage == 3:
            _name_direct_uses(model)
            self._requirement = require_gradients(model)
        if self.optimizers:  # see `block_backward_sync`
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """Make an engine where the base is split; Lightning's would compute without autocast."""
        if self.stage != 3:
            model.to(self.root_device)
            return
        import deepspeed

        self.model, *_ = deepspeed.initialize(
            args=Namespace(device_rank=self.root_device.index),
            config={**self._config, "gradient_accumulation_steps": 1},
            model=model,
            model_parameters=[],
            dist_init_required=False,
        )

    def teardown(self) -> None:
        """Take DeepSpeed's hooks off the model, so that another Trainer can train it."""
        if self.model is not self.lightning_module:  # there is an engine
            self.deepspeed_engine.destroy()
            if self.stage == 3:
                self._requirement.remove()
        super().teardown()

    @property
    def _config(self) -> dict[str, Any]:
        assert isinstance(self.config, dict)
        return self.config

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Let the graph of a step keep no weights that stage 3 puts away."""
        with self._drops_frozen_weights():
            return super().training_step(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Gradient checkpointing computes parts of the step again in here."""
        with self._drops_frozen_weights():
            return super().backward(*args, **kwargs)

    def _drops_frozen_weights(self) -> AbstractContextManager[None]:
        return drops_frozen_weights() if self.stage == 3 else nullcontext()

    # ---- accumulated batches ---------------------------------------------------------------------

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Whether the strategy counts batches.

        DeepSpeed would, and a round's server visit, one batch with many steps, would shift its
        count; Lightning counts, and says in `block_backward_sync` which passes end no step.
        """
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Backward passes in here end no optimizer step."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)


def _name_direct_uses(model: nn.Module) -> None:
    """Tell DeepSpeed of modules that use the parameters of a child without calling it.

    Adapters of embeddings do.
    """
    from deepspeed import zero

    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ParameterDict):
                for parameter in child.values():
                    zero.register_external_parameter(module, parameter)


def _settings(stage: Stage, offload: Offload, prefetch_elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
        "memory_efficient_linear": False,  # it rounds otherwise; see `drops_frozen_weights`
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": prefetch_elements,
        "sub_group_size": 1_000_000_000_000,  # the whole adapter is one part
    }
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's log alone
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: the adapter is small
        "zero_optimization": zero,
        "bf16": {"enabled": False},
        "communication_data_type": "fp32",
    }
