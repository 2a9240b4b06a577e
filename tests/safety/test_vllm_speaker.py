"""Conversations through vLLM, against a stand-in for the library.

vLLM needs a GPU and is not installed where these tests run: they have never met the real one. The
stand-in takes the arguments and gives the objects that its source and documentation (0.20 and
later) describe, and answers in capitals what it was asked, from the first letter on.
"""

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from fedsafe.safety.revision import Reviser
from fedsafe.safety.vllm_speaker import VllmSpeaker
from fedsafe.types import Conversation, RedTeamPrompt, Turn

END = 2


@dataclass
class SamplingParams:
    max_tokens: int = 16
    temperature: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    detokenize: bool = True


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class CompletionOutput:
    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int | None


@dataclass
class LLM:
    """Repeats the end of a prompt, and remembers the prompts that it has read."""

    model: str
    dtype: str
    max_model_len: int
    gpu_memory_utilization: float
    enable_prefix_caching: bool
    seed: int
    enable_lora: bool = False
    max_lora_rank: int = 16
    calls: list[tuple[list[int], SamplingParams, LoRARequest | None]] = field(default_factory=list)
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
        return [
            self._answer(prompt["prompt_token_ids"], params, lora_request)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _answer(
        self, ids: list[int], params: SamplingParams, lora: LoRARequest | None
    ) -> RequestOutput:
        assert 0 < params.max_tokens <= self.max_model_len - len(ids)
        cached = [old for old, _, other in self.calls if other == lora and ids[: len(old)] == old]
        self.calls.append((ids, params, lora))
        said = [*ids[-8:-4], END][: params.max_tokens]
        ended = said[-1] in (params.stop_token_ids or [])
        output = CompletionOutput("", said, "stop" if ended else "length")
        return RequestOutput(ids, [output], max(map(len, cached)) if cached else None)


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


@pytest.fixture
def adapter(tmp_path: Path, tiny_llama: Path) -> Path:
    """A folder that looks like an adapter's."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"r": 12, "base_model_name_or_path": str(tiny_llama)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").touch()
    return folder


def speaker(base: Path | None, adapter: Path | None = None, **settings: Any) -> VllmSpeaker:
    chosen = {"dtype": torch.bfloat16} | settings
    return VllmSpeaker(str(base) if base else None, adapter, **chosen)


def user(content: str) -> Turn:
    return Turn(role="user", content=content)


HEN: Conversation = [user("how do i enchant the hen")]
GOOSE: Conversation = [user("how do i enchant the goose")]


def test_the_whole_conversation_is_asked_in_the_chat_template(
    vllm: type[LLM], tiny_llama: Path
) -> None:
    speech = speaker(tiny_llama, memory_share=0.4).begin(0.0)
    first, nothing = speech.answer([HEN, None], max_new_tokens=9, seeds=[7, 8], temperature=0.5)
    (engine,) = vllm.made
    assert (engine.model, engine.dtype, engine.max_model_len) == (str(tiny_llama), "bfloat16", 256)
    assert engine.enable_prefix_caching
    assert engine.gpu_memory_utilization == 0.4
    [(ids, params, lora)] = engine.calls
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert tokenizer.decode(ids).endswith("how do i enchant the hen\nAssistant:")
    assert params == SamplingParams(9, 0.5, 7, [END], detokenize=False)
    assert lora is None
    assert nothing is None
    assert first is not None
    assert first._asdict() == {
        "text": "sist",
        "num_tokens": 5,
        "num_read": len(ids),
        "finished": True,
        "fits": True,
        "unreadable": False,
    }


def test_what_vllm_has_kept_does_not_count_as_read(vllm: type[LLM], tiny_llama: Path) -> None:
    speech = speaker(tiny_llama).begin(0.0)
    [first] = speech.answer([HEN], max_new_tokens=9, seeds=[0])
    assert first is not None
    longer = [*HEN, Turn(role="assistant", content=first.text), user("was that harmful?")]
    [second] = speech.answer([longer], max_new_tokens=9, seeds=[0])
    assert second is not None
    (before, *_), (after, *_) = vllm.made[0].calls
    assert (first.num_read, second.num_read) == (len(before), len(after) - len(before))


def test_an_answer_that_the_limit_ends_is_not_finished(vllm: type[LLM], tiny_llama: Path) -> None:
    [answer] = speaker(tiny_llama).begin(0.0).answer([HEN], max_new_tokens=3, seeds=[0])
    assert answer is not None
    assert (answer.finished, answer.num_tokens, answer.text) == (False, 3, "sis")


def test_a_conversation_without_room_is_not_asked_and_little_room_limits_the_answer(
    vllm: type[LLM], tiny_llama: Path
) -> None:
    speech = speaker(tiny_llama).begin(0.0)
    [answer] = speech.answer([HEN], max_new_tokens=9, seeds=[0])
    assert answer is not None
    fixed = answer.num_read - len("how do i enchant the hen")
    full, nearly = ([user("x" * (256 - fixed - room))] for room in (0, 2))
    none, short, usual = speech.answer([full, nearly, HEN], max_new_tokens=9, seeds=[0, 1, 2])
    assert none is not None
    assert (none.fits, none.text, none.finished, none.num_read) == (False, "", False, 0)
    assert short is not None
    assert (short.num_tokens, short.finished) == (2, False)
    assert usual is not None
    assert usual.finished
    assert [params.seed for _, params, _ in vllm.made[0].calls] == [0, 1, 2]


def test_a_conversation_that_the_template_refuses_stops_no_other(
    vllm: type[LLM], tiny_llama: Path
) -> None:
    speech = speaker(tiny_llama).begin(0.0)
    speech._tokenizer.chat_template = (
        "{% for m in messages %}{% if 'goose' in m['content'] %}{{ raise_exception('no geese') }}"
        "{% endif %}[{{ m['content'] }}]{% endfor %}"
    )
    refused, hen = speech.answer([GOOSE, HEN], max_new_tokens=9, seeds=[0, 1])
    assert refused is not None
    assert (refused.fits, refused.unreadable, refused.text) == (False, True, "")
    assert hen is not None
    assert hen.fits
    assert not hen.unreadable
    assert len(vllm.made[0].calls) == 1


def test_the_adapter_is_on_or_off(vllm: type[LLM], tiny_llama: Path, adapter: Path) -> None:
    both = speaker(tiny_llama, adapter)
    for scale in (1.0, 0.0):
        both.begin(scale).answer([HEN], max_new_tokens=3, seeds=[0])
    assert both.has_adapter
    (engine,) = vllm.made
    assert (engine.enable_lora, engine.max_lora_rank) == (True, 16)
    assert [lora for *_, lora in engine.calls] == [LoRARequest("global", 1, str(adapter)), None]
    with pytest.raises(ValueError, match=r"an adapter on or off, not at strength 0\.5; set critic"):
        both.begin(0.5)


def test_without_an_adapter_every_strength_is_the_base(vllm: type[LLM], tiny_llama: Path) -> None:
    assert not speaker(tiny_llama).has_adapter
    vllm.made.clear()
    for scale in (0.0, 0.5, 1.0):
        speaker(tiny_llama).begin(scale).answer([HEN], max_new_tokens=3, seeds=[0])
    assert [engine.calls[0][2] for engine in vllm.made] == [None] * 3


def test_the_adapter_names_its_base_and_brings_its_tokenizer(
    vllm: type[LLM], tiny_llama: Path, adapter: Path
) -> None:
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(adapter)
    speaker(None, adapter).begin(1.0).answer([HEN], max_new_tokens=3, seeds=[0])
    (engine,) = vllm.made
    assert engine.model == str(tiny_llama)
    assert tokenizer.decode(engine.calls[0][0]) == "[how do i enchant the hen]"


def test_an_adapter_that_vllm_cannot_run_is_refused(
    vllm: type[LLM], tiny_llama: Path, adapter: Path
) -> None:
    with pytest.raises(ValueError, match="in 16 bits, and dtype is float32; set dtype: bfloat16"):
        speaker(tiny_llama, adapter, dtype=torch.float32)
    assert vllm.made == []


def test_without_vllm_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"needs vllm; pip install 'fedsafe\[vllm\]', or set back"):
        speaker(tiny_llama)


def test_a_reviser_talks_through_it(
    vllm: type[LLM], tiny_llama: Path, adapter: Path, tmp_path: Path
) -> None:
    principle = {"name": "care", "critique_request": "harm?", "revision_request": "undo harm now"}
    constitution = tmp_path / "small.yaml"
    constitution.write_text(yaml.safe_dump({"name": "small", "principles": [principle]}))
    reviser = Reviser(str(constitution), max_new_tokens=9)
    prompts = [RedTeamPrompt(each, None, "red.jsonl", 1) for each in (HEN, GOOSE)]
    found = dict(reviser.revise(speaker(tiny_llama, adapter), prompts, seed=0))
    assert [found[place].dropped for place in (0, 1)] == ["unchanged"] * 2  # it says one thing
    assert all(len(found[place].revisions) == 1 for place in (0, 1))
    assert [lora is None for *_, lora in vllm.made[0].calls] == [False] * 2 + [True] * 4


def test_a_strength_between_is_refused_before_anything_is_said(
    vllm: type[LLM], tiny_llama: Path, adapter: Path
) -> None:
    prompts = [RedTeamPrompt(HEN, None, "red.jsonl", 1)]
    with pytest.raises(ValueError, match="an adapter on or off"):
        list(Reviser(critic=0.5).revise(speaker(tiny_llama, adapter), prompts, seed=0))
    assert vllm.made[0].calls == []
