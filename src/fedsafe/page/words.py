"""Names of measures in plain words, and numbers as people read them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeGuard

MISSING = "–"  # noqa: RUF001

MEASURES = {
    "refusal_rate": "harmful requests refused",
    "keyword_rate": "harmful requests refused (keyword rule)",
    "guard_safe_rate": "replies that a guard calls safe",
    "over_refusal_rate": "harmless requests refused",
    "over_keyword_rate": "harmless requests refused (keyword rule)",
    "accuracy_summed": "better answer chosen (summed log-probability)",
    "accuracy_normalised": "better answer chosen (per token)",
    "hhh_accuracy": "better answer chosen (HHH)",
    "help_rate": "benign requests helped",
    "help_rate_old": "benign requests helped, known tasks",
    "help_rate_new": "benign requests helped, the clients' tasks",
    "score": "judge's score, 1 to 10",
    "score_turn_1": "judge's score, first turn",
    "score_turn_2": "judge's score, second turn",
    "win_rate": "won against the baseline",
    "tie_rate": "drawn with the baseline",
    "loss_rate": "lost to the baseline",
    "adjusted_win_rate": "won, and half of the drawn",
    "num_unscored": "items without a score",
    "loss": "loss, nats per answer token",
    "loss_start": "held-out loss before the round, nats per answer token",
    "update_norm": "length of the clients' updates",
    "cosine_to_mean": "agreement of the clients' updates",
}
"""Measures by the last part of their names."""

_SENTENCES = {
    "refusal_rate": "refuses {} of harmful requests",
    "keyword_rate": "refuses {} of harmful requests, by the keyword rule",
    "guard_safe_rate": "gives replies of which a guard calls {} safe",
    "help_rate": "helps with {} of benign requests",
    "score": "scores {} of 10 with the judge",
    "adjusted_win_rate": "wins {} of comparisons, draws counted half",
    "win_rate": "wins {} of comparisons",
}
BENCHMARKS = {
    "advbench": "AdvBench",
    "harmbench": "HarmBench",
    "xstest": "XSTest",
    "hhh": "HHH",
    "mt_bench": "MT-Bench",
    "world": "the miniature",
}
SAFETY = ("refusal_rate", "keyword_rate", "guard_safe_rate")
"""Measures of safety, the most telling first; more is safer."""
HELP = ("help_rate", "score", "adjusted_win_rate", "win_rate")
"""Measures of help, the most telling first; more is better."""
_LESS_IS_BETTER = ("over_", "loss")
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
_LINE_ENDS = re.compile(r"\r\n?")


def leaf(name: str) -> str:
    """`refusal_rate` of `test/advbench/refusal_rate`."""
    return name.rpartition("/")[2]


def benchmark_of(name: str) -> str:
    """`advbench` of `test/advbench/refusal_rate`; empty where the name has none."""
    parts = [part for part in name.split("/")[:-1] if part not in ("test", "base", "val", "train")]
    return parts[0] if parts else ""


def benchmark_in_words(benchmark: str) -> str:
    """A benchmark as it is written: `AdvBench`, and `AdvBench greedy` of `advbench_greedy`."""
    for name, words in BENCHMARKS.items():
        if benchmark == name or benchmark.startswith(f"{name}_"):
            return words + benchmark.removeprefix(name).replace("_", " ")
    return benchmark


def in_words(name: str) -> str:
    """A measure's name as a reader calls it, its benchmark first."""
    benchmark, last = benchmark_of(name), leaf(name)
    words = MEASURES.get(last, last.replace("_", " "))
    return f"{benchmark_in_words(benchmark)}: {words}" if benchmark else words


def sentence(name: str, shown: str) -> str:
    """What a model does, by one of `SAFETY` and `HELP`: `refuses 98.7 % of harmful requests`."""
    return _SENTENCES[leaf(name)].format(shown)


def in_brackets(*names: str) -> str:
    """The benchmarks of some measures, to go behind a sentence; nothing where they have none."""
    benchmarks = dict.fromkeys(benchmark for name in names if (benchmark := benchmark_of(name)))
    shown = " and ".join(benchmark_in_words(each) for each in benchmarks)
    return f" ({shown})" if shown else ""


def is_percent(name: str) -> bool:
    """Whether a measure is a share in percent."""
    return any(word in leaf(name).split("_") for word in ("rate", "accuracy"))


def less_is_better(name: str) -> bool:
    """Whether a lower figure is the better one."""
    return leaf(name).startswith(_LESS_IS_BETTER)


def first_of(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted measures that there is, by the last part of its name."""
    return next((name for want in wanted for name in names if leaf(name) == want), None)


def number(value: float | None, digits: int = 1) -> str:
    """A number with a fixed number of digits, which line up below each other."""
    return f"{value:,.{digits}f}" if is_number(value) else MISSING


def figure(name: str, value: float | None) -> str:
    """A measure's value with its unit."""
    if not is_number(value):
        return MISSING
    return f"{value:.1f}\N{NO-BREAK SPACE}%" if is_percent(name) else number(value, 2)


def mean_and_spread(
    cell: Mapping[str, float | None] | None, digits: int = 1, *, with_spread: bool = True
) -> str:
    """`98.7 ± 0.3`, or without a spread, as one seed has none."""
    if cell is None or not is_number(cell.get("mean")):
        return MISSING
    spread = cell.get("spread")
    shown = f" ± {spread:.{digits}f}" if with_spread and is_number(spread) else ""
    return f"{number(cell['mean'], digits)}{shown}"


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a finite number; what was not measured is None, and may be NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def bytes_in_words(count: float) -> str:
    """`12.9 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:,.1f} TB"


def seconds_in_words(seconds: float) -> str:
    """`25 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 10:
        return f"{minutes} min {rest} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60} min"


def plural(count: float, noun: str) -> str:
    """`1 round`, `15 rounds`."""
    return f"{count:,.0f} {noun}{'' if round(count) == 1 else 's'}"


def shortened(text: str, limit: int) -> str:
    """A text's beginning, and how much was left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit].rstrip()} … ({len(text) - limit:,} more characters)"


def printable(text: str) -> str:
    """A text that a page can hold and that cannot turn it around.

    Control characters and half surrogates become a mark, and so do the signs that would change the
    direction in which the rest of the page is read. The marks of honest Arabic and Hebrew (U+200E,
    U+200F, U+061C) stay: they reach no further than the element that a text is in.
    """
    return _UNPRINTABLE.sub("\ufffd", _LINE_ENDS.sub("\n", text))
