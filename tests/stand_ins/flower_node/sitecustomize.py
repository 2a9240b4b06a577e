"""Python imports this by itself where the folder is on its path: a node without a trainer.

In the place of `resident_call` stands one that answers in an instant, as its name says: `mal`
sends something else that no server should take in each round, `cyd` hangs in its third round when
it is asked for the first time, the others add STEP to each value.
"""

import json
import sys
import time
import types
from pathlib import Path
from typing import Any

STEP = 0.001


class ResidentError(RuntimeError):
    pass


def ask(node_file: Path, letter: Any, *, timeout_seconds: float) -> Any:
    from fedsafe.federated.remote.facts import Greeting, VisitOrder, VisitReport

    facts = known(node_file)
    if letter.facts["kind"] == Greeting.kind:
        return facts_letter({**facts, "run": letter.facts["run"]})
    order = VisitOrder.read(letter.facts)
    report = VisitReport(
        run=order.run,
        ticket=order.ticket,
        round=order.round,
        client=order.client,
        name=order.name,
        loss=1.0,
        num_steps=3,
        num_tokens=30,
        num_samples=facts["num_samples"],
        num_answer_tokens=facts["num_answer_tokens"],
        seconds=0.1,
        start_nll=0.0,
        start_tokens=0,
    )
    if order.name == "cyd" and order.round == 2:
        hang_once(node_file)
    good = report.letter(trained(letter.tensors))
    return BAD[order.round](node_file, report, good) if order.name == "mal" else good


def known(node_file: Path) -> dict[str, Any]:
    node = json.loads(node_file.read_text())
    facts = json.loads(Path(node["arguments"][-1]).read_text())
    return {**facts, "client": node["name"]}


def facts_letter(facts: dict[str, Any]) -> Any:
    from fedsafe.federated.remote.letter import Letter

    return Letter(facts)


def trained(tensors: bytes, *, change: Any = lambda value: value + STEP) -> bytes:
    from safetensors.numpy import load, save

    return save({name: change(value) for name, value in load(tensors).items()})


def hang_once(node_file: Path) -> None:
    flag = node_file.parent / "hangs"
    if not flag.exists():
        flag.touch()
        time.sleep(600)


def honest(node_file: Path, report: Any, good: Any) -> Any:
    (node_file.parent / "old").write_bytes(good.to_bytes())
    return good


def not_a_number(node_file: Path, report: Any, good: Any) -> Any:
    return report.letter(trained(good.tensors, change=lambda value: value * float("nan")))


def another_shape(node_file: Path, report: Any, good: Any) -> Any:
    return report.letter(trained(good.tensors, change=lambda value: value.reshape(-1)))


def another_type(node_file: Path, report: Any, good: Any) -> Any:
    return report.letter(trained(good.tensors, change=lambda value: value.astype("int32")))


def ten_times_the_size(node_file: Path, report: Any, good: Any) -> Any:
    return report.letter(trained(good.tensors, change=lambda value: value.repeat(10, axis=0)))


def old_update(node_file: Path, report: Any, good: Any) -> Any:
    from fedsafe.federated.remote.letter import Letter

    return Letter.from_bytes((node_file.parent / "old").read_bytes())


BAD = (
    *(honest, not_a_number, another_shape, another_type, ten_times_the_size, old_update),
    *(honest,) * 20,
)
"""What `mal` does in each round."""


def warm_up(node_file: Path) -> Any:
    from fedsafe.federated.remote.facts import NodeFacts

    return NodeFacts.read({**known(node_file), "run": ""})


def stop(node_file: Path) -> None:
    """There is nothing to end."""


stand_in = types.ModuleType("fedsafe.federated.flower.resident_call")
stand_in.ask, stand_in.warm_up, stand_in.stop = ask, warm_up, stop  # type: ignore[attr-defined]
stand_in.ResidentError = ResidentError  # type: ignore[attr-defined]
sys.modules[stand_in.__name__] = stand_in
