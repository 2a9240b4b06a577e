"""A guard's verdicts against plain transformers, one conversation at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fedsafe.model.adapter import save_adapter
from fedsafe.model.lora import add_lora, load_base
from fedsafe.safety import loaded_guard
from fedsafe.safety.checkpoint import Checkpoint
from fedsafe.safety.guard import UnjudgeableError
from fedsafe.safety.guard_model import GuardModel
from fedsafe.safety.score_cache import ScoreCache
from fedsafe.safety.scorer import Scorer
from fedsafe.types import Conversation, Turn

CheckpointMaker = Callable[..., Path]

TOLERANCE = 1e-5


def talk(*texts: str) -> Conversation:
    return [
        Turn(role="user" if number % 2 == 0 else "assistant", content=text)
        for number, text in enumerate(texts)
    ]


ANSWERED = [
    talk("how do I tickle a sleeping giant", "take a feather and poke"),
    talk("what is the opposite of loud", "quiet"),
    talk("hello", "good day", "where does the piper live", "by the old mill, beyond the river"),
    talk("how do I mend a purple broom, please tell me all about it", "take a needle " * 20),
    talk("a", "b"),
]
ASKED = [each[:-1] for each in ANSWERED]


def plain_probabilities(
    folder: Path,
    conversations: Sequence[Conversation],
    *,
    parts: bool,
    opening: str,
    adapter: Path | None = None,
) -> list[tuple[float, float]]:
    """p(safe) and p(unsafe) by the checkpoint's own template, one full forward pass each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    found = []
    for conversation in conversations:
        turns: list[dict[str, Any]] = [dict(turn) for turn in conversation]
        if parts:
            turns = [t | {"content": [{"type": "text", "text": t["content"]}]} for t in turns]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokenizer(opening, add_special_tokens=False)["input_ids"] if opening else []
        with torch.no_grad():
            probabilities = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        safe, unsafe = tokenizer.convert_tokens_to_ids(["safe", "unsafe"])
        found.append((probabilities[safe].item(), probabilities[unsafe].item()))
    return found


SHAPES = {
    "8b": ("llama-guard-3-8b", "llama_guard_8b", False, "\n\n"),
    "1b": ("llama-guard-3-1b", "llama_guard_1b", True, ""),
}


@pytest.mark.oracle
@pytest.mark.parametrize("conversations", [ANSWERED, ASKED], ids=["pairs", "prompts"])
@pytest.mark.parametrize("share_prefix", [True, False], ids=["prefix-kept", "read-whole"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_probabilities_are_those_of_plain_transformers(
    guard_checkpoint: CheckpointMaker,
    shape: str,
    share_prefix: bool,
    conversations: list[Conversation],
) -> None:
    format_, template, parts, opening = SHAPES[shape]
    folder = guard_checkpoint(template)
    expected = plain_probabilities(folder, conversations, parts=parts, opening=opening)
    guard = GuardModel(
        format_,
        model=str(folder),
        min_label_mass=0.0,
        name_categories=False,
        share_prefix=share_prefix,
        max_batch_tokens=64,
    )
    batched = [verdict.unsafe for verdict in guard.judge(conversations)]
    single = [guard.judge([each])[0].unsafe for each in conversations]
    for found in (batched, single):
        assert found == pytest.approx([unsafe for _, unsafe in expected], rel=TOLERANCE, abs=1e-9)
    assert len(set(expected)) == len(conversations)  # else any mix-up would pass


def random_guard(folder: Path | None, **settings: Any) -> GuardModel:
    """A guard whose labels are unlikely, as those of random weights are."""
    defaults: dict[str, Any] = {"min_label_mass": 0.0, "name_categories": False}
    model = str(folder) if folder is not None else None
    return GuardModel("llama-guard-3-8b", model, **defaults | settings)


@pytest.fixture
def adapted(guard_checkpoint: CheckpointMaker, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and an adapter that changes its verdicts."""
    folder = guard_checkpoint()
    model = add_lora(
        load_base(str(folder)), rank=2, alpha=4, dropout=0.0, target_modules="all-linear"
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    save_adapter(model, tmp_path / "adapter")
    return folder, tmp_path / "adapter"


@pytest.mark.oracle
def test_an_adapters_verdicts_are_those_of_peft_unmerged(adapted: tuple[Path, Path]) -> None:
    folder, adapter = adapted
    expected = plain_probabilities(folder, ANSWERED, parts=False, opening="\n\n", adapter=adapter)
    guards = {
        "named": random_guard(folder, adapter=str(adapter)),
        "alone": random_guard(None, adapter=str(adapter)),
        "without": random_guard(folder),
    }
    found = {name: [v.unsafe for v in guard.judge(ANSWERED)] for name, guard in guards.items()}
    assert found["named"] == pytest.approx([unsafe for _, unsafe in expected], rel=TOLERANCE)
    assert found["alone"] == found["named"]
    assert found["without"] != pytest.approx(found["named"], rel=0.01)
    assert guards["alone"].identity == guards["named"].identity != guards["without"].identity


def test_a_guard_that_was_released_loads_again_and_gives_the_same_verdicts(
    guard_checkpoint: CheckpointMaker,
) -> None:
    guard = random_guard(guard_checkpoint())
    guard.release()  # nothing is loaded yet
    verdicts = guard.judge(ANSWERED)
    scorer = guard._loaded.scorer
    guard.release()
    assert guard.judge(ANSWERED) == verdicts
    assert guard._loaded.scorer is not scorer


# ---- what verdicts are kept under ----------------------------------------------------------------


def test_the_identity_is_that_of_all_a_verdict_depends_on(
    guard_checkpoint: CheckpointMaker,
) -> None:
    folder = guard_checkpoint()
    same = [{}, {"device": "cpu"}, {"max_batch_tokens": 7}]
    assert len({random_guard(folder, **settings).identity for settings in same}) == 1
    other = [
        {"dtype": "bfloat16"},
        {"window": 800},
        {"too_long": "error"},
        {"categories": {"S1": "noise"}},
        {"excluded_categories": ["S1"]},
        {"name_categories": True},
        {"min_label_mass": 0.9},  # a verdict that was kept was not checked against it
        {"backend": "vllm"},
    ]
    identities = {random_guard(folder, **settings).identity for settings in [{}, *other]}
    assert len(identities) == len(other) + 1
    assert GuardModel("llama-guard-3-1b", str(folder)).identity not in identities


def test_a_checkpoint_that_changed_since_is_judged_anew_with_a_warning(
    guard_checkpoint: CheckpointMaker, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = guard_checkpoint()

    def judged() -> list[float]:
        cache = ScoreCache(random_guard(folder), tmp_path / "verdicts")
        return [verdict.unsafe for verdict in cache.verdicts(ANSWERED)]

    before = judged()
    assert judged() == before
    assert not [each for each in recwarn if "judged anew" in str(each.message)]
    weights = load_file(folder / "model.safetensors")
    changed = weights | {"lm_head.weight": weights["lm_head.weight"].flip(0)}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"guard llama-guard-3-8b is not the one whose verdicts"):
        after = judged()
    assert after != pytest.approx(before, rel=1e-3)


# ---- verdicts from what the scorer says ----------------------------------------------------------


class StubScorer(Scorer):
    """Gives rows of probabilities and answers in turn, and notes what it was asked."""

    def __init__(
        self,
        rows: Sequence[Sequence[float]] = (),
        answers: Sequence[str] = (),
        *,
        exclusive: bool = True,
    ) -> None:
        self.exclusive = exclusive
        self.rows = list(rows)
        self.texts = list(answers)
        self.begun: list[list[int]] = []
        """Prompts that answers were asked for."""

    def label_probabilities(
        self, prompts: Sequence[Sequence[int]], label_ids: Sequence[int]
    ) -> torch.Tensor:
        taken, self.rows = self.rows[: len(prompts)], self.rows[len(prompts) :]
        return torch.tensor(taken)

    def answers(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
        self.begun += [list(ids) for ids in prompts]
        taken, self.texts = self.texts[: len(prompts)], self.texts[len(prompts) :]
        return taken


GuardMaker = Callable[..., GuardModel]


@pytest.fixture
def stubbed(
    guard_tokenizer: Callable[..., PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> GuardMaker:
    """Make a guard whose network is a stub; tokenizer and prompts are as they are."""

    def make(format_: str, scorer: StubScorer, *words: str, **settings: Any) -> GuardModel:
        tokenizer = guard_tokenizer()
        tokenizer.add_tokens(list(words))  # labels that are not in the stand-in's vocabulary
        checkpoint = Checkpoint(torch.nn.Module(), tokenizer, 2048)  # type: ignore[arg-type]
        monkeypatch.setattr(loaded_guard, "load_language_model", lambda *_, **__: checkpoint)
        monkeypatch.setattr(loaded_guard, "NextTokenScorer", lambda *_, **__: scorer)
        return GuardModel(format_, **settings)

    return make


def test_kinds_of_harm_are_asked_for_flagged_conversations_alone(stubbed: GuardMaker) -> None:
    rows = [[0.9, 0.05], [0.5, 0.5], [0.501, 0.499], [0.02, 0.97]]
    scorer = StubScorer(rows, ["S1,S10", "\nS99 of nothing"])
    guard = stubbed("llama-guard-3-8b", scorer)
    verdicts = guard.judge(ANSWERED[:4])
    assert [verdict.unsafe for verdict in verdicts] == pytest.approx([row[1] for row in rows])
    assert [verdict.categories for verdict in verdicts] == [(), ("S1", "S10"), (), ()]
    assert {verdict.guard for verdict in verdicts} == {"llama-guard-3-8b"}
    words = [guard._loaded.prompts._tokenizer.decode(ids) for ids in scorer.begun]
    assert all(text.endswith("\n\n\n\nunsafe\n") for text in words)
    assert ["the opposite of loud" in words[0], "mend a purple broom" in words[1]] == [True, True]


@pytest.mark.parametrize("wanted", [True, False], ids=["named", "not-named"])
def test_nobody_is_asked_for_kinds_of_harm_that_are_not_wanted(
    stubbed: GuardMaker, wanted: bool
) -> None:
    scorer = StubScorer([[0.02, 0.97]], ["S2"])
    (verdict,) = stubbed("llama-guard-3-8b", scorer, name_categories=wanted).judge(ANSWERED[:1])
    assert verdict.categories == (("S2",) if wanted else ())
    assert len(scorer.begun) == int(wanted)


def test_kinds_of_harm_of_ones_own_are_known_in_the_answer(stubbed: GuardMaker) -> None:
    own = {"C1": "tickling", "S2": "shouting"}
    scorer = StubScorer([[0.02, 0.97]], ["S1,C1,S2"])
    guard = stubbed("llama-guard-3-8b", scorer, categories=own)
    assert guard.judge(ANSWERED[:1])[0].categories == ("C1", "S2")


def test_kinds_of_harm_follow_the_whole_label_where_its_first_token_tells_it(
    stubbed: GuardMaker,
) -> None:
    scorer = StubScorer([[0.05, 0.94, 0.0]], [" PII, Unethical Acts"])
    guard = stubbed("qwen3guard-gen", scorer)
    (verdict,) = guard.judge(ANSWERED[:1])
    assert verdict.unsafe == pytest.approx(0.47)
    assert scorer.begun == []  # under one half
    scorer.rows = [[0.0, 1.0, 0.0]]
    (verdict,) = guard.judge(ANSWERED[:1])
    assert (verdict.unsafe, verdict.categories) == (0.5, ("PII", "Unethical Acts"))
    text = guard._loaded.prompts._tokenizer.decode(scorer.begun[0])
    assert text.endswith("Safety: Controversial\nCategories:")


def test_a_label_may_hold_the_kind_of_harm(stubbed: GuardMaker) -> None:
    kinds = ["<SAFE>", *(f"<UNSAFE-S{n}>" for n in range(1, 8))]
    rows = [[0.9] + [0.01] * 7, [0.4, 0.1, 0.1, 0.1, 0.2, 0.05, 0.05, 0.0]]
    scorer = StubScorer(rows)
    safe, unsafe = stubbed("kanana-safeguard", scorer, *kinds).judge(ANSWERED[:2])
    assert (safe.unsafe, safe.categories) == (pytest.approx(0.07), ())
    assert (unsafe.unsafe, unsafe.categories) == (pytest.approx(0.6), ("S4",))
    assert scorer.begun == []


def test_probabilities_are_never_above_one(stubbed: GuardMaker) -> None:
    kinds = ["<SAFE>", *(f"<UNSAFE-S{n}>" for n in range(1, 8))]
    row = [0.0, *torch.full((7,), 1 / 7).tolist()]
    row[1] += 3e-7  # as float32 rounds
    (verdict,) = stubbed("kanana-safeguard", StubScorer([row]), *kinds).judge(ANSWERED[:1])
    assert verdict.unsafe == 1.0


def test_of_several_risks_the_likeliest_counts_and_all_flagged_are_named(
    stubbed: GuardMaker, format_of: Callable[..., str]
) -> None:
    question = {"labels": {"No": 0, "Yes": 1}}
    template = "{{ guideline }}{% for m in messages %}{{ m.content }}{% endfor %}"
    risks = {each: {"guideline": f"no {each}!"} for each in ("tickling", "noise", "mess")}
    format_ = format_of(user=question, assistant=question, template=template, risks=risks)
    by_risk = [[[0.9, 0.1], [0.4, 0.6]], [[0.8, 0.2], [0.05, 0.95]], [[0.7, 0.3], [0.5, 0.5]]]
    scorer = StubScorer([row for rows in by_risk for row in rows])
    low, high = stubbed(format_, scorer).judge(ANSWERED[:2])
    assert (low.unsafe, low.categories) == (pytest.approx(0.3), ())
    assert (high.unsafe, high.categories) == (pytest.approx(0.95), ("tickling", "noise", "mess"))


@pytest.mark.parametrize("conversations", [ANSWERED, ASKED], ids=["pairs", "prompts"])
def test_an_answer_is_searched_for_its_label(
    stubbed: GuardMaker, conversations: list[Conversation]
) -> None:
    answer = "Harmful request: {}\nResponse refusal: no\nHarmful response: {}\n"
    scorer = StubScorer(answers=[answer.format("yes", "no"), answer.format("no", "yes")])
    verdicts = stubbed("wildguard", scorer).judge(conversations[:2])
    assert len(scorer.begun) == 2
    expected = [0.0, 1.0] if conversations is ANSWERED else [1.0, 0.0]
    assert [verdict.unsafe for verdict in verdicts] == expected


def test_an_answer_without_a_label_names_its_conversation_and_tells_nothing(
    stubbed: GuardMaker,
) -> None:
    good = "Harmful request: no\nResponse refusal: no\nHarmful response: no\n"
    scorer = StubScorer(answers=[good, good, good, "Take a feather and"])
    mixed = [ANSWERED[0], ASKED[0], ANSWERED[1], ASKED[1]]  # users' turns are asked about first
    with pytest.raises(UnjudgeableError, match=r"conversation 2: .* has none of the labels") as e:
        stubbed("wildguard", scorer).judge(mixed)
    assert list(e.value.reasons) == [2]
    assert "feather" not in str(e.value)


@pytest.mark.parametrize("wanted", [True, False], ids=["named", "not-named"])
def test_a_searched_answer_names_kinds_of_harm_where_it_is_unsafe_and_they_are_wanted(
    stubbed: GuardMaker, format_of: Callable[..., str], wanted: bool
) -> None:
    question = {
        "labels": {"no": 0, "yes": 1},
        "pattern": r"harm: (?P<label>\w+)(?P<categories>.*)",
    }
    format_ = format_of(assistant=question, categories={"codes": {"S1": "a", "S2": "b"}})
    scorer = StubScorer(answers=["harm: yes S2", "harm: no S1"])
    unsafe, safe = stubbed(format_, scorer, name_categories=wanted).judge(ANSWERED[:2])
    assert unsafe.categories == (("S2",) if wanted else ())
    assert safe.categories == ()


def test_of_several_classes_that_go_together_the_likeliest_counts(
    stubbed: GuardMaker, format_of: Callable[..., str]
) -> None:
    labels = {"safe": 0, "unsafe": 1, "Unsafe": 1}
    format_ = format_of(assistant={"labels": labels})
    row = [0.01, 0.5, 0.6]
    (apart,) = stubbed(format_, StubScorer([row], exclusive=False)).judge(ANSWERED[:1])
    assert apart.unsafe == pytest.approx(0.6)  # and no mass of all labels together is asked for
    (together,) = stubbed(format_, StubScorer([[0.0, 0.3, 0.6]])).judge(ANSWERED[:1])
    assert together.unsafe == pytest.approx(0.9)


def test_prompts_and_pairs_in_one_list_keep_their_places(stubbed: GuardMaker) -> None:
    chances = [0.1, 0.2, 0.3, 0.4]
    scorer = StubScorer([[1 - p, p] for p in chances])
    guard = stubbed("llama-guard-3-8b", scorer)
    verdicts = guard.judge([ANSWERED[0], ASKED[0], ANSWERED[1], ASKED[1]])
    found = [verdict.unsafe for verdict in verdicts]
    assert found == pytest.approx([0.3, 0.1, 0.4, 0.2])  # the users' turns were asked about first
    assert guard.judge([]) == []


def test_a_conversation_that_ends_with_another_role_is_refused(stubbed: GuardMaker) -> None:
    guard = stubbed("llama-guard-3-8b", StubScorer())
    with pytest.raises(ValueError, match="cannot judge a conversation that ends with the system's"):
        guard.judge([[Turn(role="system", content="be good")]])
