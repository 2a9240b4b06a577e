"""The scorer for vLLM, against a stand-in for the library.

vLLM needs a GPU and is not installed where these tests run: they have never met the real one. The
stand-in takes the arguments and gives the objects that its source and documentation (0.20 and
later) describe, and computes with transformers.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fedsafe.safety.vllm_scorer import VllmScorer

PROMPTS = [[1, 10, 20, 30], [1, 40], [1, 10, 20, 31, 32, 33]]


@dataclass
class SamplingParams:
    max_tokens: int = 16
    temperature: float = 1.0
    logprobs: int | None = None


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Logprob:
    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclass
class LLM:
    """Greedy answers of a checkpoint; keeps what it was asked."""

    model: str
    dtype: str
    max_model_len: int
    gpu_memory_utilization: float
    enable_prefix_caching: bool
    seed: int
    enable_lora: bool = False
    max_lora_rank: int = 16
    calls: list[tuple[list[SamplingParams], LoRARequest | None]] = field(default_factory=list)
    made: ClassVar[list["LLM"]] = []

    def __post_init__(self) -> None:
        self.made.append(self)

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        assert not use_tqdm
        assert lora_request is None or self.enable_lora
        self.calls.append((sampling_params, lora_request))
        model = AutoModelForCausalLM.from_pretrained(self.model).eval()
        return [
            self._answer(model, prompt["prompt_token_ids"], params)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _answer(
        self, model: PreTrainedModel, prompt: list[int], params: SamplingParams
    ) -> RequestOutput:
        assert params.temperature == 0
        assert (params.logprobs or 0) <= 20
        assert 0 < params.max_tokens <= self.max_model_len - len(prompt)
        ids, logprobs = list(prompt), []
        for _ in range(params.max_tokens):
            row = next_logprobs(model, ids)
            top = row.topk(params.logprobs or 1)
            found = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            logprobs.append({token: Logprob(p, rank + 1) for rank, (token, p) in enumerate(found)})
            ids.append(int(row.argmax()))
        new = ids[len(prompt) :]
        text = AutoTokenizer.from_pretrained(self.model).decode(new, skip_special_tokens=True)
        return RequestOutput(
            prompt, [CompletionOutput(text, new, logprobs if params.logprobs else None)]
        )


def next_logprobs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    """The stand-in, in place of the library."""
    monkeypatch.setattr(LLM, "made", [])
    library, lora, request = (ModuleType(f"vllm{n}") for n in ("", ".lora", ".lora.request"))
    library.__dict__.update(LLM=LLM, SamplingParams=SamplingParams, lora=lora)
    request.__dict__.update(LoRARequest=LoRARequest)
    for module in (library, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return LLM


def scorer(model: Path, adapter: Path | None = None, **settings: Any) -> VllmScorer:
    chosen = {"dtype": torch.bfloat16, "max_length": 64} | settings
    return VllmScorer(str(model), adapter, **chosen)


def adapter_folder(folder: Path, **config: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8} | config))
    (folder / "adapter_model.safetensors").touch()
    return folder


@pytest.mark.oracle
def test_probabilities_are_those_of_plain_transformers_for_the_likeliest_20_and_else_0(
    vllm: type[LLM], tiny_llama: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    plain = torch.stack([next_logprobs(model, prompt) for prompt in PROMPTS]).exp()
    expected = plain.where(plain >= plain.topk(20).values[:, -1:], 0)
    labels = list(range(127, -1, -1))
    found = scorer(tiny_llama).label_probabilities(PROMPTS, labels)
    assert found.dtype == torch.float32
    assert (found > 0).sum(1).tolist() == [20, 20, 20]
    torch.testing.assert_close(found, expected[:, labels], rtol=0, atol=1e-6)


def test_one_token_is_generated_for_a_label_and_prefixes_are_kept(
    vllm: type[LLM], tiny_llama: Path
) -> None:
    scorer(tiny_llama, memory_share=0.4).label_probabilities(PROMPTS, [5])
    (engine,) = vllm.made
    assert engine.enable_prefix_caching
    assert (engine.model, engine.dtype) == (str(tiny_llama), "bfloat16")
    assert (engine.max_model_len, engine.gpu_memory_utilization) == (64, 0.4)
    assert engine.calls == [([SamplingParams(1, 0.0, 20)] * 3, None)]


def test_answers_are_greedy_and_end_with_the_room(vllm: type[LLM], tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    expected = []
    for prompt, length in zip(PROMPTS, (4, 5, 2), strict=True):
        ids = list(prompt)
        for _ in range(length):
            ids.append(int(next_logprobs(model, ids).argmax()))
        new = ids[len(prompt) :]
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    assert scorer(tiny_llama, max_length=8).answers(PROMPTS, max_new_tokens=5) == expected


def test_a_prompt_without_room_for_an_answer_is_refused(vllm: type[LLM], tiny_llama: Path) -> None:
    message = "prompt 2 has 6 tokens, which leaves no room for an answer within max_length 6"
    with pytest.raises(ValueError, match=message):
        scorer(tiny_llama, max_length=6).label_probabilities(PROMPTS, [5])
    assert vllm.made[0].calls == []


@pytest.mark.parametrize(
    ("config", "room"),
    [
        pytest.param({"r": 4}, 8, id="smallest"),
        pytest.param({"r": 16}, 16, id="exact"),
        pytest.param({"r": 17}, 32, id="in-between"),
        pytest.param({"r": 8, "rank_pattern": {"q_proj": 100}}, 128, id="pattern"),
        pytest.param({"r": 512, "rank_pattern": None}, 512, id="largest"),
    ],
)
def test_an_adapter_is_asked_for_and_has_room_for_its_rank(
    vllm: type[LLM], tiny_llama: Path, tmp_path: Path, config: dict[str, Any], room: int
) -> None:
    adapter = adapter_folder(tmp_path, **config)
    asked = scorer(tiny_llama, adapter)
    asked.label_probabilities(PROMPTS, [5])
    asked.answers(PROMPTS, max_new_tokens=1)
    (engine,) = vllm.made
    assert (engine.enable_lora, engine.max_lora_rank) == (True, room)
    requests = [request for _, request in engine.calls]
    assert requests == [LoRARequest("guard", 1, str(adapter))] * 2


def test_an_adapter_that_vllm_cannot_run_is_refused(
    vllm: type[LLM], tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json; give the folder of an"):
        scorer(tiny_llama, tmp_path)
    adapter = adapter_folder(tmp_path, r=513)
    with pytest.raises(ValueError, match="has rank 513 and vllm takes up to 512; merge it"):
        scorer(tiny_llama, adapter)
    with pytest.raises(ValueError, match="in 16 bits, and dtype is float32; set dtype: bfloat16"):
        scorer(tiny_llama, adapter, dtype=torch.float32)
    assert vllm.made == []


def test_without_vllm_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"needs vllm; pip install 'fedsafe\[vllm\]', or set back"):
        scorer(tiny_llama)


def test_a_broken_vllm_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path
) -> None:
    (tmp_path / "vllm.py").write_text("import what_vllm_needs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(ModuleNotFoundError, match="what_vllm_needs"):
        scorer(tiny_llama)
