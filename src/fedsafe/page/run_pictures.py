"""The pictures of one run's page."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedsafe.page.blocks import Pictures
from fedsafe.page.charts import Bar, Line, Visit, bar_chart, line_chart, visit_chart
from fedsafe.page.records import RunRecord
from fedsafe.page.words import (
    benchmark_in_words,
    benchmark_of,
    is_number,
    is_percent,
    leaf,
    plural,
)

_MAX_ROUNDS = 60
_SHORT = {"refusal_rate": "refused", "over_refusal_rate": "refused needlessly"}


def round_pictures(run: RunRecord, names: Sequence[str]) -> Pictures:
    """The losses, and a picture for the percentages and one for the scores of each benchmark."""
    losses = {
        "training": run.measure("loss"),
        "held out": run.measure("val/loss"),
        "held out, before the round": run.measure("val/loss_start"),
    }
    lines = _lines({name: points for name, points in losses.items() if points})
    pictures = []
    if lines:
        pictures.append(line_chart(lines, name="loss", title="Loss", unit="nats per answer token"))
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        if run.measure(name):
            groups.setdefault((benchmark_of(name), is_percent(name)), []).append(name)
    for place, ((benchmark, percent), members) in enumerate(groups.items()):
        lines = _lines({_short(name): run.measure(name) for name in members})
        pictures.append(
            line_chart(
                lines,
                name=f"measure-{place}",
                title=benchmark_in_words(benchmark) or "Asked after each round",
                unit="percent" if percent else "score",
                percent=percent,
            )
        )
    return Pictures(pictures)


def _lines(measures: dict[str, list[tuple[int, float]]]) -> list[Line]:
    return [Line(name, points, style) for style, (name, points) in enumerate(measures.items())]


def _short(name: str) -> str:
    last = leaf(name)
    return _SHORT.get(last, last.removesuffix("_rate").replace("_", " "))


def filter_picture(clients: Sequence[dict[str, Any]]) -> Pictures:
    """What each client trains on and what it lost."""
    names = [name for name in ("dropped", "refused") if any(row[name] for row in clients)]
    bars = [
        Bar(row["client"], [row["left"] - row["refused"], *(row[name] for name in names)])
        for row in clients
    ]
    shares = [100 * row["unsafe"] / row["judged"] for row in clients if row["judged"]]
    caption = (
        f"Of each client's samples, {min(shares):.0f} to {max(shares):.0f} % were called unsafe."
        if shares
        else "No sample was judged."
    )
    chart = bar_chart(
        bars,
        names=["kept", *names],
        name="filter",
        title="What each client trains on and what it lost",
        caption=caption,
    )
    return Pictures([chart])


def cai_pictures(run: RunRecord) -> Pictures:
    """How many pairs each round gave, and how far the server moved the adapter."""
    visits = run.rounds_with_cai
    counts = {
        "asked": [(place, float(v["asked"])) for place, v in visits if v.get("asked") is not None],
        "pairs": [(place, float(v["pairs"])) for place, v in visits if v.get("pairs") is not None],
    }
    moves = {
        "clients' mean": run.measure("update_norm"),
        "constitution": [
            (place, v["update_norm"]) for place, v in visits if v.get("update_norm") is not None
        ],
    }
    pictures = []
    for name, title, unit, lines in (
        ("pairs", "Prompts asked and pairs trained on", "prompts", counts),
        ("moves", "How far a round moves the adapter", "length of the update", moves),
    ):
        known = _lines({label: points for label, points in lines.items() if points})
        if known:
            pictures.append(line_chart(known, name=name, title=title, unit=unit))
    return Pictures(pictures)


def visit_picture(run: RunRecord, *, max_clients: int) -> Pictures:
    """Length and agreement of every update of the last rounds; the clients that came most."""
    rows = run.rounds[-_MAX_ROUNDS:]
    counts = Counter(visit["client"] for row in rows for visit in row["clients"])
    clients = sorted(name for name, _ in counts.most_common(max_clients))
    visits = [
        Visit(
            row["round"],
            clients.index(visit["client"]),
            _finite(visit.get("update_norm")),
            _finite(visit.get("cosine_to_mean")),
            visit["status"],
        )
        for row in rows
        for visit in row["clients"]
        if visit["client"] in clients
    ]
    chart = visit_chart(
        visits,
        clients,
        name="visits",
        title="Updates by client and round",
        caption=" ".join(_told(visits, num_left_out=len(counts) - len(clients))),
    )
    return Pictures([chart], size="large")


def _finite(value: float | None) -> float | None:
    return value if is_number(value) else None


def _told(visits: Sequence[Visit], *, num_left_out: int) -> list[str]:
    words = [
        "A square is a visit: the larger, the longer the update; the stronger its colour, the more "
        "it agrees with the round's mean. Diamonds point against it."
    ]
    cosines = [visit.cosine for visit in visits if visit.cosine is not None]
    known = f"{min(cosines):.2f} to {max(cosines):.2f}" if cosines else "not known"
    words.append(f"The cosine to the mean is {known}.")
    lost = Counter(visit.status for visit in visits if visit.norm is None)
    for status, count in lost.items():
        what = "without a known length" if status == "ok" else status
        words.append(f"{plural(count, 'visit')} {what} ({'x' if status == 'failed' else '+'}).")
    if num_left_out > 0:
        words.append(f"{num_left_out:,} clients that came less often are left out.")
    return words
