"""Scoring with vLLM, an inference engine for GPUs; optional, the extra `vllm` installs it.

References:
    Kwon et al. (2023), Efficient Memory Management for Large Language Model Serving with
    PagedAttention. https://arxiv.org/abs/2309.06180
    Automatic prefix caching: https://docs.vllm.ai/en/stable/features/automatic_prefix_caching/
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fedsafe.model.adapter import read_adapter_config
from fedsafe.safety.scorer import Scorer

MAX_LABELS = 20
"""The likeliest tokens whose probabilities are read: as many as vLLM gives unless told otherwise.

A label that is not among them counts as 0. Where up to ten labels that are have a probability of
0.9 together, as a verdict needs, one left out has less than 0.01.
"""

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can make room for; an adapter of a rank in between takes the next."""


class VllmScorer(Scorer):
    """Scores prompts with vLLM, which keeps the keys and values of shared prefixes by itself.

    The same prompts in another order can get probabilities that differ by rounding errors; vLLM
    has an environment variable against it, `VLLM_BATCH_INVARIANT=1`, which costs speed.

    Args:
        model: Hub name or folder of a causal language model.
        adapter: Folder of a LoRA adapter in PEFT's format; None for none.
        dtype: Type of the weights; with an adapter one of 16 bits.
        max_length: Tokens of a prompt and its answer together, at most the model's positions.
        memory_share: Share of the GPU's memory that vLLM takes, 0 to 1.

    Raises:
        ValueError: If vLLM is not installed, or cannot run the adapter.
    """

    def __init__(
        self,
        model: str,
        adapter: Path | None = None,
        *,
        dtype: torch.dtype,
        max_length: int,
        memory_share: float = 0.9,
    ) -> None:
        self._vllm = import_vllm()
        self._max_length = max_length
        self._with_adapter: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        if adapter is not None:
            settings = {"enable_lora": True, "max_lora_rank": room_for_rank(adapter, dtype)}
            self._with_adapter = {"lora_request": lora_request(adapter, name="guard")}
        self._engine = self._vllm.LLM(
            model=model,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_length,
            gpu_memory_utilization=memory_share,
            enable_prefix_caching=True,
            seed=0,
            **settings,
        )

    def label_probabilities(
        self, prompts: Sequence[Sequence[int]], label_ids: Sequence[int]
    ) -> Tensor:
        """See `Scorer`; a label that is not among the 20 likeliest tokens has probability 0."""
        options = [{"max_tokens": 1, "logprobs": MAX_LABELS}] * len(prompts)
        likeliest = [answer.logprobs[0] for answer in self._generate(prompts, options)]
        return torch.tensor(
            [
                [math.exp(found[label].logprob) if label in found else 0.0 for label in label_ids]
                for found in likeliest
            ],
            dtype=torch.float32,
        )

    def answers(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
        """See `Scorer`; an answer ends where prompt and answer have `max_length` tokens."""
        rooms = [self._max_length - len(prompt) for prompt in prompts]
        options = [{"max_tokens": min(max_new_tokens, room)} for room in rooms]
        return [str(answer.text) for answer in self._generate(prompts, options)]

    def _generate(
        self, prompts: Sequence[Sequence[int]], options: Sequence[dict[str, int]]
    ) -> list[Any]:
        """What is written after each prompt, greedily.

        Raises:
            ValueError: If a prompt leaves no room for a token.
        """
        for index, prompt in enumerate(prompts):
            if len(prompt) >= self._max_length:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens, which leaves no room for an answer "
                    f"within max_length {self._max_length}; raise it, or shorten the prompts"
                )
        outputs = self._engine.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [self._vllm.SamplingParams(temperature=0.0, **each) for each in options],
            use_tqdm=False,
            **self._with_adapter,
        )
        return [output.outputs[0] for output in outputs]


def import_vllm() -> Any:
    """The library.

    Raises:
        ValueError: If it is not installed, or this process is one of several ranks.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"the backend vllm runs in one process, and this is one of {dist.get_world_size()} "
            "ranks; start the command without torchrun, or set backend: transformers"
        )
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":  # it is there, and something that it needs is not
            raise
        raise ValueError(
            "the backend vllm needs vllm; pip install 'fedsafe[vllm]', or set backend: transformers"
        ) from error
    return vllm


def lora_request(adapter: Path, *, name: str) -> Any:
    """What tells vLLM to compute with an adapter."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=1, lora_path=str(adapter.resolve()))


def room_for_rank(adapter: Path, dtype: torch.dtype) -> int:
    """The rank that vLLM is to make room for.

    Raises:
        ValueError: If it cannot run the adapter.
    """
    if dtype is torch.float32:
        raise ValueError(
            f"vllm computes adapters in 16 bits, and dtype is float32; set dtype: bfloat16, or "
            f"merge {adapter} into its base with fedsafe export"
        )
    config: dict[str, Any] = read_adapter_config(adapter)
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if rank > _RANKS[-1]:
        raise ValueError(
            f"the adapter {adapter} has rank {rank} and vllm takes up to {_RANKS[-1]}; merge it "
            "into its base with fedsafe export"
        )
    return next(room for room in _RANKS if room >= rank)
