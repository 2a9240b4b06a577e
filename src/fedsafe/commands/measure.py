"""`fedsafe measure`: how well guards tell unsafe conversations from safe ones."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, OpenUnitInterval
from rich.console import Console

from fedsafe.commands.noise import quiet_known_noise
from fedsafe.commands.parsing import call
from fedsafe.commands.ranks import check_agreed, joined
from fedsafe.data.output_files import write_whole
from fedsafe.data.sources import load_samples
from fedsafe.evaluation.guard_evaluation import (
    GuardResult,
    WantedRecall,
    labelled_only,
    measure_guard,
)
from fedsafe.guard_report import (
    choice_lines,
    draw_precision_recall,
    guards_markdown,
    guards_table,
)
from fedsafe.safety.guard import Guard
from fedsafe.safety.guard_model import GuardModel  # noqa: F401  (configurations name it)
from fedsafe.types import JudgedPart


@dataclass(frozen=True)
class MeasuredGuard:
    """A row of the table.

    Attributes:
        guard: Who judges.
        name: What the table calls it; the default is the guard's own name.
        threshold: Probability from which it calls a conversation unsafe, 0 to 1.
    """

    guard: Guard
    name: str | None = None
    threshold: ClosedUnitInterval = 0.5


def run(name: str, arguments: list[str]) -> None:
    """Parse the arguments and measure."""
    quiet_known_noise()
    call(measure, name, arguments)


def measure(  # noqa: PLR0913
    input: str | list[str],
    output: str,
    guard: Guard | None = None,
    guards: list[MeasuredGuard] | None = None,
    *,
    threshold: ClosedUnitInterval | None = None,
    judge: JudgedPart = "pair",
    wanted_recall: OpenUnitInterval | None = None,
    validation_share: OpenUnitInterval = 0.5,
    seed: NonNegativeInt = 0,
    on_bad_row: Literal["error", "skip"] = "error",
) -> None:
    """Judge labelled conversations with one or several guards and say how right each is.

    Verdicts are kept in the cache: a command that was stopped goes on, and another threshold costs
    nothing. Started by torchrun, each rank has its own copy of the guards and judges some of the
    conversations; the figures are the same.

    Args:
        input: Files or hub names of conversations whose `label` is safe or unsafe; those without a
            label are counted and left out.
        output: Directory for guards.json, guards.md (accuracy, precision, recall, F1, AUPRC and
            false-positive rate; by category and by client too) and precision_recall.png.
        guard: Guard that judges, its class and settings, where it is only one.
        guards: Guards to compare, such as one before and after fine-tuning: guard, and perhaps name
            and threshold of each.
        threshold: Probability from which the one guard calls a conversation unsafe, 0 to 1; the
            default is 0.5.
        judge: What the guards are shown of a conversation: the `pair` of prompt and response, the
            `prompt` alone, or the `response` alone.
        wanted_recall: Share of the unsafe that a guard must flag. The highest threshold that does
            so is chosen on a part of the conversations, and takes the place of the guards' own;
            the figures are those of the other part.
        validation_share: Share of the conversations that the threshold is chosen on.
        seed: Seed of the choice of that part.
        on_bad_row: Stop at rows that cannot be used, or skip them.
    """
    rows = _rows(guard, guards, threshold)
    with joined() as peers:
        samples = load_samples(input, on_bad_row=on_bad_row)
        labelled = labelled_only(samples)
        check_agreed(peers, "numbers of labelled conversations", len(labelled))
        settings: dict[str, Any] = {
            "judge": judge,
            "wanted": wanted_recall and WantedRecall(wanted_recall, validation_share, seed),
            "peers": peers,
        }
        results = [
            measure_guard(row.guard, labelled, name=row.name, threshold=row.threshold, **settings)
            for row in rows
        ]
        unlabelled = len(samples) - len(labelled)
        if peers.index == 0:
            about = {"input": input, "judge": judge, "unlabelled": unlabelled}
            _show(results, unlabelled, _write(results, Path(output), about))


def _show(results: Sequence[GuardResult], unlabelled: int, files: Sequence[Path]) -> None:
    console = Console()
    console.print(guards_table(results))
    for line in choice_lines(results):
        console.print(line, soft_wrap=True)
    if unlabelled:
        console.print(f"left out {unlabelled:,} conversations without a label")
    console.print(f"wrote {', '.join(map(str, files))}", soft_wrap=True)


def _rows(
    guard: Guard | None, guards: list[MeasuredGuard] | None, threshold: float | None
) -> list[MeasuredGuard]:
    if (guard is None) == (not guards):
        raise ValueError(
            f"{'neither' if guard is None else 'both'} of guard and guards given; give one of them"
        )
    if guard is not None:
        return [MeasuredGuard(guard, threshold=0.5 if threshold is None else threshold)]
    assert guards is not None
    if threshold is not None:
        raise ValueError(
            f"threshold {threshold:g} would change none of guards; give it to each of them"
        )
    names = [row.name or row.guard.name for row in guards]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two guards are called {name}; give each a name of its own")
    return guards


def _write(results: Sequence[GuardResult], folder: Path, about: dict[str, Any]) -> list[Path]:
    """Write the figures, each file whole or not at all; the picture where it shows something."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**about, "guards": [result.as_json() for result in results]}
    texts = {
        folder / "guards.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n",
        folder / "guards.md": guards_markdown(results),
    }
    for file, text in texts.items():
        write_whole(file, [text])
    picture = folder / "precision_recall.png"
    if not results[0].labels.any():
        picture.unlink(missing_ok=True)
        return list(texts)
    draw_precision_recall(results, picture)
    return [*texts, picture]
