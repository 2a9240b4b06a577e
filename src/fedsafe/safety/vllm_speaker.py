"""Conversations with vLLM, an inference engine for GPUs; optional, the extra `vllm` installs it.

References:
    Kwon et al. (2023), Efficient Memory Management for Large Language Model Serving with
    PagedAttention. https://arxiv.org/abs/2309.06180
    LoRA adapters in vLLM: https://docs.vllm.ai/en/stable/features/lora/
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from fedsafe.data.chat import RefusedConversationError, ensure_chat_template, render
from fedsafe.data.tokenizer import load_tokenizer
from fedsafe.model.dialogues import Answer
from fedsafe.model.pretrained import base_of
from fedsafe.safety.drafts import Speaker, Speech
from fedsafe.safety.vllm_scorer import import_vllm, lora_request, room_for_rank
from fedsafe.types import Conversation

_LONGEST = 8192
"""Tokens of a conversation where the model could read more, which would take memory from others."""


class VllmSpeaker(Speaker):
    """A model that talks through vLLM, which keeps what it has read of a conversation by itself.

    Args:
        base: Hub name or folder of a causal language model; None takes the one the adapter names.
        adapter: Folder of a LoRA adapter in PEFT's format; None for none, and every scale of it is
            the base alone.
        dtype: Type of the weights; with an adapter one of 16 bits.
        memory_share: Share of the GPU's memory that vLLM takes, 0 to 1.

    Raises:
        ValueError: If vLLM is not installed, or cannot run the adapter.
    """

    def __init__(
        self,
        base: str | None,
        adapter: Path | None = None,
        *,
        dtype: torch.dtype,
        memory_share: float = 0.9,
    ) -> None:
        self._vllm = import_vllm()
        name = base if base is not None else base_of(_known(adapter))
        settings: dict[str, Any] = {}
        self._with_adapter: dict[str, Any] = {}
        if adapter is not None:
            settings = {"enable_lora": True, "max_lora_rank": room_for_rank(adapter, dtype)}
            self._with_adapter = {"lora_request": lora_request(adapter, name="global")}
        own = adapter is not None and (adapter / "tokenizer_config.json").exists()
        self._tokenizer = load_tokenizer(str(adapter) if own else name)
        ensure_chat_template(self._tokenizer)
        self._max_length = _num_positions(name)
        self._engine = self._vllm.LLM(
            model=name,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=self._max_length,
            gpu_memory_utilization=memory_share,
            enable_prefix_caching=True,
            seed=0,
            **settings,
        )

    @property
    def has_adapter(self) -> bool:
        """See `Speaker`."""
        return bool(self._with_adapter)

    def begin(self, adapter_scale: float) -> Speech:
        """See `Speaker`.

        Raises:
            ValueError: If the adapter is to be neither on nor off.
        """
        if self._with_adapter and adapter_scale not in (0.0, 1.0):
            raise ValueError(
                f"vLLM has an adapter on or off, not at strength {adapter_scale:g}; set critic: "
                "base or global, or backend: transformers"
            )
        with_adapter = self._with_adapter if adapter_scale else {}
        return _VllmSpeech(
            self._vllm,
            self._engine,
            self._tokenizer,
            max_length=self._max_length,
            with_adapter=with_adapter,
        )


class _VllmSpeech(Speech):
    """Conversations with the adapter on or off; vLLM remembers them, this does not."""

    def __init__(
        self,
        vllm: Any,
        engine: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        with_adapter: dict[str, Any],
    ) -> None:
        self._vllm = vllm
        self._engine = engine
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._with_adapter = with_adapter

    def answer(
        self,
        conversations: Sequence[Conversation | None],
        *,
        max_new_tokens: int,
        seeds: Sequence[int],
        temperature: float = 0.0,
    ) -> list[Answer | None]:
        """See `Dialogues.answer`."""
        answers: list[Answer | None] = [None] * len(conversations)
        prompts: dict[int, list[int]] = {}
        for row, conversation in enumerate(conversations):
            if conversation is None:
                continue
            try:
                ids = self._read(conversation)
            except RefusedConversationError:
                answers[row] = Answer("", 0, 0, finished=False, fits=False, unreadable=True)
                continue
            if len(ids) < self._max_length:
                prompts[row] = ids
            else:
                answers[row] = Answer("", 0, 0, finished=False, fits=False)
        if prompts:
            outputs = self._engine.generate(
                [{"prompt_token_ids": ids} for ids in prompts.values()],
                [
                    self._sampling(
                        min(max_new_tokens, self._max_length - len(ids)), seeds[row], temperature
                    )
                    for row, ids in prompts.items()
                ],
                use_tqdm=False,
                **self._with_adapter,
            )
            for row, output in zip(prompts, outputs, strict=True):
                answers[row] = self._answer(output)
        return answers

    def _read(self, conversation: Conversation) -> list[int]:
        text = render(self._tokenizer, conversation, add_generation_prompt=True)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _sampling(self, max_tokens: int, seed: int, temperature: float) -> Any:
        end = self._tokenizer.eos_token_id
        return self._vllm.SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop_token_ids=[] if end is None else [end],  # beside those of the model
            detokenize=False,  # the adapter may come with a tokenizer of its own
        )

    def _answer(self, output: Any) -> Answer:
        said = output.outputs[0]
        finished = said.finish_reason == "stop"
        ids = said.token_ids[:-1] if finished else said.token_ids  # without that of the end
        return Answer(
            str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip(),
            num_tokens=len(said.token_ids),
            num_read=len(output.prompt_token_ids) - (output.num_cached_tokens or 0),
            finished=finished,
        )


def _num_positions(name: str) -> int:
    config = AutoConfig.from_pretrained(name).get_text_config()
    return min(getattr(config, "max_position_embeddings", _LONGEST), _LONGEST)


def _known(adapter: Path | None) -> Path:
    assert adapter is not None, "there is a base, or an adapter that names one"
    return adapter
