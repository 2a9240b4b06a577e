"""Red-team prompts a second that a model answers, criticises and revises: fedsafe, and `generate`.

    .venv/bin/python benchmarks/revision_throughput.py [--quick] [--device cuda]

Both sides say the same three turns, greedily: the red response, its critique, its revision. The
critic is the model itself (`global`) or its base, the adapter off (`base`), which then reads prompt
and response once more. The sides take turns in one process, so that what else the machine does hits
all alike.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import workload
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from workload import RESERVED_TOKENS, Cost, Shape, Stopwatch

from fedsafe.data.chat import default_chat_template, render
from fedsafe.model.adapter import adapter_scale
from fedsafe.model.dialogues import Answer
from fedsafe.model.lora import add_lora, load_base
from fedsafe.safety.model_speaker import ModelSpeaker
from fedsafe.safety.revision import Speaker, Speech
from fedsafe.types import Conversation
from fedsafe.world.evaluation_sets import evaluation_sets
from fedsafe.world.grammar import load_grammar
from fedsafe.world.pretraining import pretrained_base

Critic = Literal["global", "base"]
CRITICS: tuple[Critic, ...] = ("global", "base")
REQUEST_TOKENS = 20
"""Of a critique or revision request to the random model."""


class Requests(NamedTuple):
    """What the user says after the first and the second turn."""

    critique: str
    revision: str


class Workload(NamedTuple):
    """A model and what it is asked."""

    title: str
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[str]
    requests: list[Requests]
    """One a prompt."""
    max_new_tokens: int


# ---- the peer ---------------------------------------------------------------------------------


class OneByOne(Speaker):
    """`generate`, one prompt at a time, the whole conversation read at each turn."""

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model = model
        self._tokenizer = tokenizer

    def begin(self, adapter_scale: float) -> Speech:
        """Nothing is kept from turn to turn."""
        return _Rereading(self._model, self._tokenizer, adapter_scale)


class _Rereading(Speech):
    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, scale: float) -> None:
        self._model, self._tokenizer, self._scale = model, tokenizer, scale

    def answer(
        self,
        conversations: Sequence[Conversation | None],
        *,
        max_new_tokens: int,
        seeds: Sequence[int],
        temperature: float = 0.0,
    ) -> list[Answer | None]:
        """Greedy answers."""
        with adapter_scale(self._model, self._scale), torch.no_grad():
            return [each and self._answer(each, max_new_tokens) for each in conversations]

    def _answer(self, conversation: Conversation, max_new_tokens: int) -> Answer:
        text = render(self._tokenizer, conversation, add_generation_prompt=True)
        encoded = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")
        ids = encoded["input_ids"].to(self._model.device)
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
        )
        new = output[0, ids.shape[1] :]
        said = str(self._tokenizer.decode(new, skip_special_tokens=True)).strip()
        return Answer(said, len(new), ids.shape[1], finished=False)


# ---- the work ---------------------------------------------------------------------------------


class Talk(NamedTuple):
    """What came of three turns with every prompt."""

    texts: list[tuple[str, str, str]]
    num_generated: int
    num_read: int


def three_turns(
    speaker: Speaker, work: Workload, critic: Critic, *, num_prompts: int | None = None
) -> Talk:
    """Red response, critique and revision of each prompt."""
    chats: list[Conversation] = [[_user(text)] for text in work.prompts[:num_prompts]]
    red = speaker.begin(1.0)
    judge = red if critic == "global" else speaker.begin(0.0)
    num_generated = num_read = 0
    follow_ups = (
        [each.critique for each in work.requests],
        [each.revision for each in work.requests],
    )
    for speech, requests in ((red, follow_ups[0]), (judge, follow_ups[1]), (judge, None)):
        answers = speech.answer(chats, max_new_tokens=work.max_new_tokens, seeds=range(len(chats)))
        for place, (chat, answer) in enumerate(zip(chats, answers, strict=True)):
            assert answer is not None
            assert answer.fits
            chat.append({"role": "assistant", "content": answer.text})
            if requests is not None:
                chat.append(_user(requests[place]))
            num_generated += answer.num_tokens
            num_read += answer.num_read
    texts = [(chat[1]["content"], chat[3]["content"], chat[5]["content"]) for chat in chats]
    return Talk(texts, num_generated, num_read)


def _user(text: str) -> Any:
    return {"role": "user", "content": text}


def world_work(num_prompts: int, *, own_ends: bool) -> Workload:
    """The miniature world's model on its forbidden questions."""
    base = pretrained_base()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = _with_adapter(load_base(str(base)), rank=16, alpha=16.0, target_modules="all-linear")
    questions = [row["prompt"] for row in evaluation_sets().harmful]
    principles = load_grammar().principles
    chosen = random.Random(0).sample(questions, num_prompts)
    requests = [
        Requests(each.critique_request, each.revision_request)
        for each in (principles[i % len(principles)] for i in range(num_prompts))
    ]
    title = "world's model" + (", own ends" if own_ends else "")
    work = Workload(title, model, tokenizer, chosen, requests, max_new_tokens=24)
    return work if own_ends else _endless(work)


def llama_work(shape: Shape, *, num_prompts: int, longest: int, device: str) -> Workload:
    """A random Llama on random words."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        base = load_base(str(workload.save_base(shape, Path(folder))), dtype=dtype)
    return work_on(
        base, shape, lora=workload.LORA, num_prompts=num_prompts, longest=longest, device=device
    )


def work_on(
    base: PreTrainedModel,
    shape: Shape,
    *,
    lora: dict[str, Any],
    num_prompts: int,
    longest: int,
    device: str,
) -> Workload:
    """A base on random words, prompts as long as instruction data; no answer ends early."""
    model = _with_adapter(base, **lora).to(device)
    rng = random.Random(0)

    def words(number: int) -> str:
        return " ".join(
            f"w{rng.randrange(RESERVED_TOKENS, shape.vocabulary)}" for _ in range(number)
        )

    lengths = workload.conversation_lengths(num_prompts, longest=longest).tolist()
    prompts = [words(length) for length in lengths]
    requests = [Requests(words(REQUEST_TOKENS), words(REQUEST_TOKENS)) for _ in prompts]
    layers: Any = model.get_base_model().model.layers
    title = f"Llama, {sum(p.numel() for p in layers.parameters()) / 1e6:.0f}M"
    tokenizer = _word_tokenizer(shape.vocabulary)
    return _endless(Workload(title, model, tokenizer, prompts, requests, max_new_tokens=48))


def _with_adapter(base: Any, **lora: Any) -> PeftModel:
    """A random adapter that changes what is said, so that base and global model differ."""
    model = add_lora(base, dropout=0.0, **lora).eval()
    generator = torch.Generator(base.device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05, generator=generator)
    return model


def _endless(work: Workload) -> Workload:
    """No token ends an answer, so that all run to the limit."""
    work.tokenizer.eos_token = None
    work.model.get_base_model().generation_config.eos_token_id = None
    return work


def _word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token a word: decoding gives the words back."""
    special = ("<pad>", "<s>", "</s>", "<unk>")
    known = [*special, "User:", "Assistant:", "\n"]
    words = [*known, *(f"w{i}" for i in range(len(known), vocabulary))]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        additional_special_tokens=["</s>"],
        chat_template=default_chat_template().replace("eos_token", "' </s>'"),
        clean_up_tokenization_spaces=False,
    )


# ---- measuring --------------------------------------------------------------------------------


class Result(NamedTuple):
    """What both sides showed with one critic."""

    costs: dict[str, Cost]
    """Of all prompts, median over the repeats."""
    talks: dict[str, Talk]

    @property
    def identical(self) -> float:
        """Share of the prompts of which all three turns are the same."""
        pairs = list(zip(*(talk.texts for talk in self.talks.values()), strict=True))
        return sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def compare(work: Workload, critic: Critic, *, repeats: int) -> Result:
    """Two prompts each to warm up, then all of them, taking turns."""
    speakers: dict[str, Speaker] = {
        "fedsafe": ModelSpeaker(work.model, work.tokenizer),
        "one_by_one": OneByOne(work.model, work.tokenizer),
    }
    for speaker in speakers.values():
        three_turns(speaker, work, critic, num_prompts=2)
    costs: dict[str, list[Cost]] = {name: [] for name in speakers}
    talks = {}
    for repeat in range(repeats):
        for name, speaker in speakers.items():
            watch = Stopwatch()
            talks[name] = three_turns(speaker, work, critic)
            costs[name].append(watch.read())
            seconds = costs[name][-1].wall_seconds
            place = f"pass {repeat + 1}/{repeats}, {work.title}, critic {critic}"
            print(f"{place}, {name}: {seconds:.2f} s", flush=True)
    return Result({name: workload.median(each) for name, each in costs.items()}, talks)


def figures(results: dict[str, dict[Critic, Result]], *, by: str) -> dict[str, Any]:
    """The ratios and the prompts per second by `wall_seconds` or `cpu_seconds`."""

    def seconds(result: Result, side: str) -> float:
        value: float = getattr(result.costs[side], by)
        return value

    def ratio(result: Result) -> float:
        return round(seconds(result, "one_by_one") / seconds(result, "fedsafe"), 3)

    def speeds(result: Result) -> dict[str, float]:
        return {
            side: round(len(talk.texts) / seconds(result, side), 3)
            for side, talk in result.talks.items()
        }

    return {
        "vs_one_by_one": each_result(results, ratio),
        "prompts_per_second": each_result(results, speeds),
    }


def each_result(results: dict[str, dict[Critic, Result]], figure: Any) -> dict[str, Any]:
    """A figure by workload and critic."""
    return {
        name: {critic: figure(result) for critic, result in by_critic.items()}
        for name, by_critic in results.items()
    }


def show(works: dict[str, Workload], results: dict[str, dict[Critic, Result]]) -> None:
    """Print the table."""
    table = Table("model", "critic", "side", "prompts/s", "seconds", "CPU s", "read", "generated")
    for name, by_critic in results.items():
        for critic, result in by_critic.items():
            for side, talk in result.talks.items():
                cost = result.costs[side]
                table.add_row(
                    works[name].title,
                    critic,
                    side,
                    f"{len(talk.texts) / cost.wall_seconds:.2f}",
                    f"{cost.wall_seconds:.2f}",
                    f"{cost.cpu_seconds:.2f}",
                    f"{talk.num_read:,}",
                    f"{talk.num_generated:,}",
                )
    Console(width=120).print(table)


def run(*, quick: bool, device: str, repeats: int, num_prompts: int) -> dict[str, Any]:
    """Run the benchmark and print its table."""
    shape, longest = (workload.TINY, 48) if quick else (workload.LARGE, 512)
    llama = llama_work(shape, num_prompts=num_prompts, longest=longest, device=device)
    works = {"llama": llama}
    if device == "cpu" and not quick:
        works["world"] = world_work(num_prompts, own_ends=False)
        works["world_own_ends"] = world_work(num_prompts, own_ends=True)
    results = {
        name: {critic: compare(work, critic, repeats=repeats) for critic in CRITICS}
        for name, work in works.items()
    }
    show(works, results)
    return {
        "benchmark": "revision_throughput",
        "quick": quick,
        **figures(results, by="wall_seconds"),
        "identical": each_result(results, lambda result: result.identical),
        "per_cpu_second": figures(results, by="cpu_seconds"),
        "prompts": num_prompts,
        "repeats": repeats,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **workload.machine(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=None, help="timed passes of each side")
    parser.add_argument("--prompts", type=int, default=None, help="red-team prompts")
    chosen = parser.parse_args(arguments)
    workload.be_quiet()
    torch.set_num_threads(chosen.threads)
    repeats = chosen.repeats or (1 if chosen.quick else 3)
    num_prompts = chosen.prompts or (6 if chosen.quick else 64)
    workload.print_json(
        run(quick=chosen.quick, device=chosen.device, repeats=repeats, num_prompts=num_prompts)
    )


if __name__ == "__main__":
    main()
