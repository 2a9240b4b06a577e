"""The page of one run."""

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedsafe.evaluation.scores import NUM_UNSCORED
from fedsafe.federated.round_log import cai_costs
from fedsafe.page.blocks import Block, Command, Facts, Grid, Hidden, Page, Section, Text
from fedsafe.page.records import RunRecord
from fedsafe.page.run_outcome import run_cards, run_lede
from fedsafe.page.run_pictures import cai_pictures, filter_picture, round_pictures, visit_picture
from fedsafe.page.samples import revisions, unscored, with_warning, worst_of_run
from fedsafe.page.words import (
    MISSING,
    figure,
    in_words,
    is_number,
    is_percent,
    leaf,
    number,
    plural,
)

MAX_CLIENTS = 24
"""Clients that tables and pictures name; of more, those with the most samples or visits."""
MAX_VISITS = 200
"""Visits that the table of them has, the last ones."""
_HELD_OUT = {"val/loss": "held-out loss", "val/loss_start": "held-out loss before the round"}


def run_page(run: RunRecord) -> Page:
    """All that is known of a run."""
    training = [
        Section("rounds", "By round", "Round by round", _rounds(run)),
        Section("filter", "Safety filter", "What the safety filter did", _filter(run)),
        Section(
            "constitution",
            "Constitution",
            "What constitutional training cost and changed",
            _cai(run),
        ),
        Section("updates", "Clients' updates", "How the clients' updates agree", _updates(run)),
    ]
    evaluated_alone = not run.rounds and run.results
    return Page(
        title=run.name,
        kind="Report of a run",
        lede=list(run_lede(run)),
        cards=list(run_cards(run)),
        note=run.note,
        sections=[
            Section("results", "Benchmarks", "Results of benchmarks", _results(run)),
            *(training if not evaluated_alone else []),
            Section("samples", "Samples", "Samples", _samples(run)),
            Section("repeat", "Repeat it", "How to repeat it", _repeat(run)),
        ],
    )


def _results(run: RunRecord) -> list[Block]:
    names = dict.fromkeys(name.partition("/")[2] for name in run.results if "/" in name)
    shown = [name for name in names if leaf(name) not in (NUM_UNSCORED, "loss")]
    if not shown:
        return [
            Text(
                "Not measured. fedsafe test with data.benchmarks asks them, of the trained model "
                "and with --adapter none of the base alone.",
                tone="missing",
            )
        ]
    overall = [name for name in shown if name.count("/") == 1 and "_by_category" not in name]
    finer = [name for name in shown if name not in overall]
    blocks: list[Block] = [_result_grid(run, overall, "Benchmarks, all items")]
    if finer:
        blocks.append(Hidden("By category", [_result_grid(run, finer, "Benchmarks, by category")]))
    blocks += unscored(run.replies("test"), who="after training")
    return blocks + unscored(run.replies("base"), who="of the base alone")


def _result_grid(run: RunRecord, names: Sequence[str], caption: str) -> Grid:
    rows = []
    for name in names:
        base, tested = (run.results.get(f"{subject}/{name}") for subject in ("base", "test"))
        gain = f"{tested - base:+.1f}" if is_number(base) and is_number(tested) else MISSING
        rows.append([_result_name(name), figure(name, base), figure(name, tested), gain])
    headings = ["measure", "base alone", "after training", "difference"]
    subjects = {"base/": "The base alone", "test/": "The trained model"}
    notes = [
        f"{who} was not measured."
        for prefix, who in subjects.items()
        if not any(name.startswith(prefix) for name in run.results)
    ]
    return Grid(caption, headings, rows, notes=notes)


def _result_name(name: str) -> str:
    """A measure with its category in brackets."""
    parts = name.split("/")
    words = in_words(name.replace("_by_category", ""))
    if name.endswith("_by_category"):
        return f"{words}, mean of the categories"
    return f"{words} [{'/'.join(parts[1:-1])}]" if len(parts) > 2 else words


def _rounds(run: RunRecord) -> list[Block]:
    if not run.rounds:
        return [Text("No round has finished.", tone="missing")]
    names = [name for name in _measures_by_round(run) if name not in _HELD_OUT]
    columns = ["loss", *(name for name in _HELD_OUT if run.measure(name)), *names]
    rows = [
        [str(row["round"]), *(_cell(name, row.get(name)) for name in columns)]
        for row in ([{"round": 0, **run.before}] if run.before else []) + run.rounds
    ]
    headings = ["round", *("training loss" if n == "loss" else _by_round_name(n) for n in columns)]
    blocks: list[Block] = [round_pictures(run, names)]
    if not names:
        blocks.append(
            Text("No benchmark was asked by round; the callback SafetyProbe does.", tone="missing")
        )
    grid = Grid("Measures by round; round 0 is before training", headings, rows)
    return [*blocks, Hidden("The figures", [grid])]


def _measures_by_round(run: RunRecord) -> list[str]:
    return list(
        dict.fromkeys(
            name
            for row in [run.before, *run.rounds]
            for name in row
            if name.startswith("val/") and leaf(name) != NUM_UNSCORED
        )
    )


def _by_round_name(name: str) -> str:
    return _HELD_OUT.get(name) or in_words(name)


def _cell(name: str, value: float | None) -> str:
    return number(value, 3 if name in ("loss", *_HELD_OUT) else 1 if is_percent(name) else 2)


def _filter(run: RunRecord) -> list[Block]:
    done = run.filtered
    if done is None:
        return [Text("This run had no safety filter: every client trained on all it has.")]
    clients = sorted(done["clients"], key=lambda row: -row["judged"])[:MAX_CLIENTS]
    shown = [row for row in done["clients"] if row in clients]
    total = {"client": f"all {len(done['clients']):,}", **done["total"]}
    rows = [_filter_row(row) for row in shown]
    rows.append(_filter_row(total))
    if done["held_out"]["judged"]:
        rows.append(_filter_row({"client": "held out", **done["held_out"]}))
    headings = ["client", "judged", "unsafe", "dropped", "refused", "left", "precision", "recall"]
    one = done["threshold"] is not None
    notes = [
        f"Guard {done['guard']}, policy {done['policy']}, unsafe from {done['threshold']:g}."
        if one
        else "Each client judged its own samples, with a guard and by a policy of its own.",
        "Precision and recall are against the labels in the data, where there are any.",
    ]
    if len(done["clients"]) > len(shown):
        notes.append(f"{len(done['clients']) - len(shown):,} smaller clients are in filter.json.")
    for count, what in (
        ("shortened", "judged by beginning and end alone"),
        ("unjudged", "left out: the guard could not judge them"),
    ):
        if done[count]:
            notes.append(f"{plural(done[count], 'sample')} {what}.")
    return [filter_picture(shown), Grid("Samples of each client", headings, rows, notes=notes)]


def _filter_row(row: dict[str, Any]) -> list[str]:
    called, labelled = row["hits"] + row["false_alarms"], row["hits"] + row["misses"]
    counts = [f"{row[name]:,}" for name in ("judged", "unsafe", "dropped", "refused", "left")]
    shares = [f"{row['hits'] / all_:.0%}" if all_ else MISSING for all_ in (called, labelled)]
    return [row["client"], *counts, *shares]


def _cai(run: RunRecord) -> list[Block]:
    visits = run.rounds_with_cai
    if not visits:
        return [Text("This run had no constitutional training.")]
    costs = cai_costs(run.rounds)
    dropped: Counter[str] = Counter()
    for _, visit in visits:
        dropped.update(visit.get("dropped", {}))
    share = costs["seconds"] / max(1e-9, sum(row["seconds"] for row in run.rounds))
    facts = [
        ("rounds with training steps", f"{costs['visits']:,}"),
        ("prompts asked", f"{costs['asked']:,}"),
        ("pairs made", f"{costs['kept']:,}"),
        ("pairs trained on, all rounds", f"{costs['pairs']:,}"),
        *((f"dropped: {reason}", f"{count:,}") for reason, count in sorted(dropped.items())),
        ("steps, SFT + DPO", f"{costs['sft_steps']:,} + {costs['dpo_steps']:,}"),
        *((f"tokens {n}", f"{costs[f'tokens_{n}']:,}") for n in ("generated", "read", "trained")),
        ("seconds revising", number(costs["seconds_revising"])),
        ("seconds training", number(costs["seconds_training"])),
        ("share of the run's time", f"{share:.0%}"),
    ]
    return [cai_pictures(run), Facts(facts), Hidden("By round", [_cai_grid(run)])]


def _cai_grid(run: RunRecord) -> Grid:
    headings = [
        "round",
        "asked",
        "pairs",
        "SFT",
        "DPO",
        "SFT loss",
        "DPO loss",
        "seconds",
        "change",
    ]
    rows = [
        [
            str(place) if place else "before",
            *(number(visit.get(n), 0) for n in ("asked", "pairs", "sft_steps", "dpo_steps")),
            *(number(visit.get(n), 3) for n in ("sft_loss", "dpo_loss")),
            *(number(visit.get(n), 2) for n in ("seconds", "update_norm")),
        ]
        for place, visit in run.rounds_with_cai
    ]
    return Grid("Constitutional training by round", headings, rows)


def _updates(run: RunRecord) -> list[Block]:
    if not run.rounds:
        return [Text("No round has finished.", tone="missing")]
    visits = [
        (row["round"], visit)
        for row in run.rounds
        for visit in [*row["clients"], *row.get("strays", [])]
    ]
    rows = [
        [
            str(place),
            visit["client"],
            visit["status"] + (f": {visit['reason']}" if "reason" in visit else ""),
            number(visit.get("update_norm"), 3),
            number(visit.get("cosine_to_mean"), 3),
            number(visit.get("loss"), 3),
        ]
        for place, visit in visits[-MAX_VISITS:]
    ]
    headings = ["round", "client", "status", "length", "cosine to mean", "loss"]
    earlier = len(visits) - len(rows)
    caption = f"The last {len(rows):,} visits" if earlier else "Visits"
    notes = [f"{plural(earlier, 'earlier visit')}: see rounds.jsonl."] if earlier else []
    grid = Grid(caption, headings, rows, notes=notes, texts=(0, 1, 2))
    return [visit_picture(run, max_clients=MAX_CLIENTS), Hidden("The figures", [grid])]


def _samples(run: RunRecord) -> list[Block]:
    return with_warning([*worst_of_run(run), *revisions(run)])


def _repeat(run: RunRecord) -> list[Block]:
    return [*environment(run), *_tests(run), *_configuration(run)]


def _tests(run: RunRecord) -> list[Block]:
    """The commands that measured it, each once."""
    commands = dict.fromkeys(shlex.join(map(str, one["command"])) for one in run.tested.values())
    return [Command(each) for each in commands]


def environment(run: RunRecord) -> list[Block]:
    """Command, versions and device, as far as they were written down."""
    if not run.about:
        return [Text("The command was not written down (run.json is missing).", tone="missing")]
    command = run.about.get("command") or []
    facts = [
        (name, str(run.about[name]))
        for name in ("started", "device", "system")
        if run.about.get(name)
    ]
    facts += [(name, str(value)) for name, value in (run.about.get("versions") or {}).items()]
    return [*([Command(shlex.join(map(str, command)))] if command else []), Facts(facts)]


def _configuration(run: RunRecord) -> list[Block]:
    if run.config is None:
        return [Text("There is no config.yaml in this folder.", tone="missing")]
    given = (run.about.get("command") or [])[1:3]
    again = [
        "fedsafe",
        *(given if given == ["federate", "server"] else ["fit"]),
        "--config",
        str(run.folder / "config.yaml"),
        "--run_dir",
        "runs/again",
    ]
    return [
        Text("The whole configuration, every default included, starts the same run:"),
        Command(shlex.join(again)),
        Hidden("config.yaml", [Command(run.config)]),
    ]
