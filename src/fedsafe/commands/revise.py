"""`fedsafe revise`: red-team prompts to pairs of red and revised responses."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jsonargparse.typing import NonNegativeInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from fedsafe.commands.noise import quiet_known_noise
from fedsafe.commands.parsing import call
from fedsafe.commands.ranks import check_agreed, joined
from fedsafe.data.chat import ensure_chat_template
from fedsafe.data.sources import Rejected
from fedsafe.data.tokenizer import load_tokenizer
from fedsafe.model.generation import Model
from fedsafe.model.lora import load_base
from fedsafe.model.pretrained import load_trained
from fedsafe.peers import Peers
from fedsafe.safety.checkpoint import checkpoint_digest
from fedsafe.safety.guard_model import GuardModel  # noqa: F401  (configurations name it)
from fedsafe.safety.model_speaker import ModelSpeaker
from fedsafe.safety.revision import Reviser, RevisionCounts, Speaker
from fedsafe.safety.revision_file import Journal, OnBadRow, RevisionOutputs, read_prompts
from fedsafe.safety.transcripts import REASONS, Transcript
from fedsafe.safety.vllm_speaker import VllmSpeaker
from fedsafe.types import RedTeamPrompt

_VERSION = {"version": 2}  # raise it when a change of this package's code changes transcripts


def run(name: str, arguments: list[str]) -> None:
    """Parse the arguments and revise."""
    quiet_known_noise()
    call(revise, name, arguments)


def revise(  # noqa: PLR0913
    input: str,
    output: str,
    reviser: Reviser,
    *,
    base: str | None = None,
    adapter: str | None = None,
    backend: Literal["transformers", "vllm"] = "transformers",
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    memory_share: float = 0.9,
    seed: NonNegativeInt = 0,
    split: str = "train",
    on_bad_row: OnBadRow = "skip",
    overwrite: bool = False,
) -> None:
    """Let a model answer red-team prompts, criticise and revise its answers; write the pairs.

    Each batch of prompts is safe on disk as soon as it is through: a command that was stopped goes
    on behind it. The files appear together, when all is done. Started by torchrun, each rank has
    its own copy of the model and takes some of the batches; the files are the same.

    Args:
        input: File of prompts, of type .jsonl, .jsonl.gz, .json, .csv or .parquet, or a hub name.
        output: File NAME.jsonl for the pairs, a transcript a line. Beside it come
            NAME.rejected.jsonl (transcripts that make no pair, and the reason), NAME.bad.jsonl
            (rows that could not be used, and why) and NAME.summary.json.
        reviser: How the answers are revised, and which pairs are kept.
        base: Hub name or folder of the base model; the default is the one the adapter names.
        adapter: Folder of the adapter in PEFT's format, such as `adapter/` of a run directory:
            with it the model is the global one. Without one, the base criticises itself.
        backend: Who computes: `transformers`, or `vllm` (needs a GPU and the extra `vllm`).
        dtype: Type of the base's weights. In bfloat16 rounding, and with it what is said, differs
            between batch sizes (`--reviser.batch_size`); in float32 all sizes say the same.
        device: Where to compute; `auto` takes a CUDA device if there is one. vLLM decides itself.
        memory_share: Share of the GPU's memory that vLLM takes; lower it, to 0.45 say, where a
            guard is on the same GPU.
        seed: Seed of sampling and of the principles that are drawn.
        split: Split to take of a hub name.
        on_bad_row: Skip rows that cannot be used and list them in NAME.bad.jsonl, or stop with an
            error.
        overwrite: Whether earlier files, and unfinished work of other settings, may be replaced.
    """
    outputs = RevisionOutputs(Path(output))
    model = _Model(
        base, adapter, backend=backend, dtype=dtype, device=device, memory_share=memory_share
    )
    with joined() as peers:
        peers.from_first(lambda: outputs.check(Path(input), overwrite=overwrite))
        rows = read_prompts(input, split=split, on_bad_row=on_bad_row)
        prompts = [row for row in rows if not isinstance(row, Rejected)]
        check_agreed(peers, f"numbers of prompts in {input}", len(prompts))
        settings = peers.from_first(lambda: _settings(reviser, model, seed=seed))
        journal = Journal(outputs.journal, settings | _VERSION, prompts, overwrite=overwrite)
        work = _Work(reviser, model, prompts, journal, seed, peers)
        with work.taken_up(outputs, Path(input), overwrite=overwrite) as done:
            speed = work.do(done)
            if peers.index == 0:
                about = {"input": input, "output": output, **settings}
                _show(_write_all(rows, journal, outputs, about, speed), outputs)


class _Model:
    """The model that is asked for, loaded when it is needed."""

    def __init__(
        self,
        base: str | None,
        adapter: str | None,
        *,
        backend: str,
        dtype: str,
        device: str,
        memory_share: float,
    ) -> None:
        if base is None and adapter is None:
            raise ValueError("there is no model to ask; give --base, --adapter or both")
        if backend == "vllm" and device != "auto":
            raise ValueError(f"device is {device!r}, and vLLM chooses its own; leave it out")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda and no CUDA device is visible; leave --device out")
        if not 0 < memory_share <= 1:
            raise ValueError(f"memory_share is {memory_share}; give a number above 0, at most 1")
        self._base = base
        self._adapter = Path(adapter) if adapter is not None else None
        self._backend = backend
        self._dtype = dtype
        self._device = device
        self._memory_share = memory_share

    def identity(self) -> dict[str, str]:
        """What a transcript depends on."""
        digest = checkpoint_digest(self._base, self._adapter)
        return {"checkpoint": digest, "backend": self._backend, "dtype": self._dtype}

    def load(self) -> Speaker:
        """Load the weights."""
        dtype = getattr(torch, self._dtype)
        if self._backend == "vllm":
            return VllmSpeaker(
                self._base, self._adapter, dtype=dtype, memory_share=self._memory_share
            )
        model: Model
        if self._adapter is not None:
            model, tokenizer = load_trained(self._adapter, base=self._base, dtype=dtype)
        else:
            assert self._base is not None
            model, tokenizer = load_base(self._base, dtype=dtype), load_tokenizer(self._base)
            ensure_chat_template(tokenizer)
        on_gpu = self._device != "cpu" and torch.cuda.is_available()
        model.eval().requires_grad_(False).to("cuda" if on_gpu else "cpu")
        return ModelSpeaker(model, tokenizer)


def _settings(reviser: Reviser, model: _Model, *, seed: int) -> dict[str, Any]:
    """All that decides a transcript beside its prompt."""
    identity = model.identity()
    settings = {"reviser": reviser.identity(), "model": identity, "seed": seed}
    if identity["dtype"] == "float32":
        return settings
    return {**settings, "batch_size": reviser.batch_size}  # it decides how numbers are rounded


class _Work(NamedTuple):
    """What is to be revised, and by whom."""

    reviser: Reviser
    model: _Model
    prompts: Sequence[RedTeamPrompt]
    journal: Journal
    """Written by the first rank."""
    seed: int
    peers: Peers

    @contextmanager
    def taken_up(
        self, outputs: RevisionOutputs, source: Path, *, overwrite: bool
    ) -> Iterator[Collection[int]]:
        """Open the journal; yields the places of the prompts that are through."""
        with ExitStack() as stack:

            def take_up() -> set[int]:
                stack.enter_context(self.journal.open())
                outputs.files.check(source, overwrite=overwrite or self.journal.is_complete)
                return set(self.journal.transcripts)

            yield self.peers.from_first(take_up)

    def do(self, done: Collection[int]) -> dict[str, Any]:
        """Revise what the journal does not hold yet; returns how fast."""
        generated, left, writes = 0, len(self.prompts) - len(done), self.peers.index == 0
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not writes) as progress:
            task = progress.add_task("Revising", total=len(self.prompts), completed=len(done))
            speaker = self.model.load() if left else None
            started = time.perf_counter()
            for batch in self._batches(speaker, done) if speaker is not None else ():
                if writes:
                    self.journal.add(batch)
                generated += sum(transcript.num_generated for _, transcript in batch)
                progress.advance(task, len(batch))
            seconds = time.perf_counter() - started
        rate = round(left / seconds, 2) if generated else None
        return {"seconds": round(seconds, 3), "prompts_per_second": rate, "taken_over": len(done)}

    def _batches(
        self, speaker: Speaker, done: Collection[int]
    ) -> Iterator[list[tuple[int, Transcript]]]:
        return self.reviser.revise_in_batches(
            speaker, self.prompts, seed=self.seed, done=done, replicas=self.peers
        )


def _write_all(
    rows: Sequence[RedTeamPrompt | Rejected],
    journal: Journal,
    outputs: RevisionOutputs,
    about: dict[str, Any],
    speed: dict[str, Any],
) -> dict[str, Any]:
    """Write what became of each row, in order, and the figures; returns these."""
    with outputs.files.open():
        transcripts = iter(journal.in_order())
        for row in rows:
            outputs.write(row if isinstance(row, Rejected) else next(transcripts))
        counts = RevisionCounts.of(journal.in_order()).as_dict()
        num_rows = outputs.num_rows()
        assert sum(num_rows.values()) == len(rows), num_rows
        assert num_rows["kept"] == counts.pop("kept"), num_rows
        assert num_rows["rejected"] == sum(counts["dropped"].values()), num_rows
        summary = {**about, "rows": len(rows), **num_rows, **counts, **speed}
        outputs.files.write_summary(outputs.summary, summary)
    return summary


def _show(summary: Mapping[str, Any], outputs: RevisionOutputs) -> None:
    """Tell what became of the prompts, and where it is."""
    console = Console()
    console.print(_table(summary))
    if not summary["kept"]:
        console.print(_nothing_kept(summary), soft_wrap=True)
    console.print(f"wrote {', '.join(map(str, outputs.files.written()))}", soft_wrap=True)


def _table(summary: Mapping[str, Any]) -> Table:
    """What became of the prompts, as `NAME.summary.json` holds it."""
    table = Table(title="Revision", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    reviser = summary["reviser"]
    table.add_row(
        "reviser", f"{reviser['constitution'].rpartition(' ')[0]}, critic {reviser['critic']}"
    )
    table.add_row("rows", f"{summary['rows']:,}")
    table.add_row("kept", f"{summary['kept']:,}")
    table.add_row("rejected", f"{summary['rejected']:,}")
    for reason, count in summary["dropped"].items():
        table.add_row(f"  {reason}", f"{count:,} ({REASONS[reason]})")
    table.add_row("bad", f"{summary['bad']:,}")
    if summary["cut_off"]:
        turns = [f"{turn} {count:,}" for turn, count in summary["cut_off"].items()]
        table.add_row("cut off", f"{', '.join(turns)} at max_new_tokens")
    generated, read = summary["tokens_generated"], summary["tokens_read"]
    table.add_row("tokens", f"{generated:,} generated, {read:,} read")
    rate = summary["prompts_per_second"]
    speed = f", {rate:,.1f} prompts/s" if rate is not None else ""
    table.add_row("time", f"{summary['seconds']:,.1f} s{speed}")
    if summary["taken_over"]:
        table.add_row("", f"{summary['taken_over']:,} were through before the command stopped")
    return table


def _nothing_kept(summary: Mapping[str, Any]) -> str:
    asked, refused = summary["asked"], summary["dropped"].get("refused", 0)
    if refused == asked:
        return (
            f"The model refused all {asked:,} prompts: there is no red response to revise, and "
            f"{summary['output']} is empty."
        )
    return f"None of {asked:,} prompts made a pair, and {summary['output']} is empty."
