"""What nodes send that must not count, and nodes that are slow or gone."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import Federation
from memory_post import MemoryPost, Node
from remote_federations import build_nodes, build_server
from safetensors.torch import load, save
from torch import Tensor

from fedsafe.federated.aggregation import WeightedMean
from fedsafe.federated.client_drift import Scaffold
from fedsafe.federated.remote import reception, visits
from fedsafe.federated.remote.facts import HELLO, VISIT, Failure
from fedsafe.federated.remote.letter import Letter
from fedsafe.federated.remote.post import Delivery

ServerMaker = Callable[..., Federation]
NodesMaker = Callable[..., dict[int, Node]]
Tensors = dict[str, Tensor]

BOB = 12
ROUNDS = {"clients_per_round": 4}
"""All four take part in each round; the node of bob is the one that misbehaves."""


def facts(**changed: Any) -> Callable[[Letter], Letter]:
    """The same answer with other facts; a fact that is None is left out."""

    def tamper(letter: Letter) -> Letter:
        given = {**letter.facts, **changed}
        return letter._replace(facts={n: v for n, v in given.items() if v is not None})

    return tamper


def tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Letter], Letter]:
    """The same answer with other tensors."""
    return lambda letter: letter._replace(tensors=save(change(load(letter.tensors))))


def data(change: Callable[[bytes], bytes]) -> Callable[[Letter], Letter]:
    """The same answer with other bytes in place of its tensors."""
    return lambda letter: letter._replace(tensors=change(letter.tensors))


def with_nan(named: Tensors) -> Tensors:
    next(iter(named.values())).view(-1)[3] = float("nan")
    return named


def _first(named: Tensors, change: Callable[[Tensor], Tensor]) -> Tensors:
    name = next(iter(named))
    return {**named, name: change(named[name]).contiguous()}


def with_header(header: object) -> Callable[[bytes], bytes]:
    """The same length, and a header that says something else."""

    def change(tensors: bytes) -> bytes:
        length = int.from_bytes(tensors[:8], "little")
        text = (
            json.dumps(header, separators=(",", ":")).encode()
            if not isinstance(header, bytes)
            else header
        )
        return tensors[:8] + text.ljust(length)[:length] + tensors[8 + length :]

    return change


def overlapping(tensors: bytes) -> dict[str, Any]:
    """The header of a file all of whose tensors begin at its start."""
    header = json.loads(tensors[8 : 8 + int.from_bytes(tensors[:8], "little")])
    for each in header.values():
        begin, end = each["data_offsets"]
        each["data_offsets"] = [0, end - begin]
    return dict(header)


BAD: dict[str, tuple[Callable[[Letter], Letter], str]] = {
    "not a number": (tensors(with_nan), "1 of 4096 values of the adapter are not finite"),
    "infinite": (
        tensors(lambda named: {n: x + float("inf") for n, x in named.items()}),
        "4096 of 4096 values of the adapter are not finite",
    ),
    "another shape": (tensors(lambda named: _first(named, lambda x: x.T)), "is of shape"),
    "another rank": (tensors(lambda named: _first(named, lambda x: x[:2])), "their values alone"),
    "another type": (
        tensors(lambda named: {n: x.view(torch.int32) for n, x in named.items()}),
        "is of type I32; agreed was F32",
    ),
    "half the precision": (
        tensors(lambda named: {n: x.bfloat16() for n, x in named.items()}),
        "their values alone should take 16,384",
    ),
    "another name": (
        tensors(lambda named: {n + "?": x for n, x in named.items()}),
        "16 tensors are missing and 16 are unknown",
    ),
    "one tensor more": (
        tensors(lambda named: {**named, "more": torch.zeros(9)}),
        "their values alone should take",
    ),
    "one tensor less": (
        tensors(lambda named: dict(list(named.items())[1:])),
        "their values alone should take",
    ),
    "ten times the size": (data(lambda tensors: tensors * 10), "is the limit"),
    "no tensors": (data(lambda tensors: b""), "the tensors take 0 bytes"),
    "cut off": (data(lambda tensors: tensors[:-1]), "their values alone should take"),
    "no safetensors": (data(lambda tensors: b"\x93NUMPY" * 100), "the tensors take 600 bytes"),
    "a header that is no object": (data(with_header(3)), "no readable header"),
    "a header of a hundred lists": (data(with_header(b"[" * 900)), "no readable header"),
    "values that overlap": (
        data(lambda tensors: with_header(overlapping(tensors))(tensors)),
        "the tensors cannot be read",
    ),
    "someone else's name": (facts(name="cyd"), "the update is of name cyd; expected bob"),
    "someone else's number": (facts(client=2), "the update is of client 2; expected 1"),
    "another round": (facts(round=7), "the update is of round 8; expected "),
    "another run": (facts(run="r"), "the update is of run r; expected"),
    "another ticket": (facts(ticket="t"), "the ticket is not that of the order"),
    "more steps": (facts(num_steps=9), "num_steps is 9; expected 1"),
    "more samples": (facts(num_samples=10**9), "num_samples is 1000000000; expected 4"),
    "other tokens": (facts(num_answer_tokens=1), "num_answer_tokens is 1; expected"),
    "negative tokens": (facts(num_tokens=-1), "num_tokens is -1; expected 0 to"),
    "a loss that is no number": (facts(loss=float("nan")), "loss is nan; expected a finite"),
    "an infinite loss": (facts(start_nll=float("inf")), "start_nll is inf; expected a finite"),
    "a loss whose sum is infinite": (facts(loss=1.7e308), "loss is 1.7e+308; expected a finite"),
    "a loss beyond numbers": (facts(loss=10**400), "loss is 1000"),
    "a loss that is text": (facts(loss="1"), "loss of a letter of kind 'visit' is a str"),
    "no loss": (facts(loss=None), "has the facts"),
    "an unknown fact": (facts(**{"\x1b[31mred" * 500: 1}), "has the facts"),
    "a greeting": (facts(kind="hello"), "the letter is of kind 'hello'; expected 'visit'"),
    "no kind": (facts(kind=None), "the letter is of kind None; expected 'visit'"),
}


def misbehaving(
    nodes: dict[int, Node], tamper: Callable[[Letter], Letter], *, node: int = BOB
) -> dict[int, Node]:
    """The same nodes, of which one spoils its answers to orders."""

    def answer(letter: Letter) -> Letter:
        honest = nodes[node](letter)
        return tamper(honest) if letter.facts["kind"] == VISIT else honest

    return {**nodes, node: answer}


def untrained(nodes: dict[int, Node]) -> dict[int, Node]:
    """The same nodes, but each only moves what it is sent, and reports as if it had trained."""
    reports: dict[int, Letter] = {}

    def answer(node: int, letter: Letter) -> Letter:
        if letter.facts["kind"] != VISIT:
            return nodes[node](letter)
        if node not in reports:
            reports[node] = nodes[node](letter)
        repeated = {name: letter.facts[name] for name in ("run", "ticket", "round")}
        moved = {name: x + 1e-3 * node for name, x in load(letter.tensors).items()}
        return Letter({**reports[node].facts, **repeated}, save(moved))

    return {node: partial(answer, node) for node in nodes}


def of(row: dict[str, Any], name: str) -> dict[str, Any]:
    """What a round says of a client."""
    [found] = [client for client in row["clients"] if client["client"] == name]
    return dict(found)


def in_turn(tampers: Iterable[Callable[[Letter], Letter]]) -> Callable[[Letter], Letter]:
    """Another misbehaviour each time."""
    left = iter(tampers)
    return lambda letter: next(left)(letter)


def never(letter: Letter) -> Letter:
    return Failure("ValueError").letter()


@pytest.fixture(scope="module")
def one_after_another(
    tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, conversations: Path
) -> tuple[Federation, Federation]:
    """A run in each of whose rounds bob sends another thing, and one in which he always fails."""
    once = {"local_steps": 1}
    nodes = untrained(build_nodes(base=tiny_gpt2, path=conversations, rounds=once))
    settings = {"rounds": {**ROUNDS, **once}, "trainer": {"max_epochs": len(BAD)}}
    folder = tmp_path_factory.mktemp("bad")

    def run(name: str, tamper: Callable[[Letter], Letter]) -> Federation:
        post = MemoryPost(misbehaving(nodes, tamper))
        return build_server(folder / name, post, base=tiny_gpt2, **settings).fit()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visits, "POLL_SECONDS", 0.001)
        patch.setattr(reception, "POLL_SECONDS", 0.001)
        bad = in_turn(tamper for tamper, _ in BAD.values())
        return run("sends", bad), run("fails", never)


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_left_out_and_named(
    one_after_another: tuple[Federation, Federation], name: str
) -> None:
    run, _ = one_after_another
    row = run.rows[list(BAD).index(name)]
    record = of(row, "bob")
    assert record.keys() == {"client", "status", "reason"}
    assert record["status"] == "refused"
    assert BAD[name][1] in record["reason"]
    assert len(record["reason"]) <= 301
    assert record["reason"].isprintable()
    assert [client["status"] for client in row["clients"]] == ["ok", "ok", "ok", "refused"]


def test_what_was_refused_has_changed_nothing(
    one_after_another: tuple[Federation, Federation],
) -> None:
    sends, fails = one_after_another
    assert torch.equal(sends.adapter, fails.adapter)
    assert [of(row, "bob") for row in fails.rows] == len(BAD) * [
        {
            "client": "bob",
            "status": "failed",
            "reason": "it failed with ValueError; its own log says why",
        }
    ]
    expected = [
        {**row, "clients": [c for c in row["clients"] if c["client"] != "bob"]}
        for row in fails.rows
    ]
    for ours, theirs in zip(sends.rows, expected, strict=True):
        ours["clients"] = [each for each in ours["clients"] if each["client"] != "bob"]
        assert ours.pop("bytes_up") >= theirs.pop("bytes_up")
        assert ours == theirs


def test_what_scaffold_learnt_is_checked_too(nodes: NodesMaker, server: ServerMaker) -> None:
    """A control variate that is not finite would spoil all rounds to come."""

    def spoil(named: Tensors) -> Tensors:
        return {**named, "mean_gradient": named["mean_gradient"] / 0}

    settings = {"rounds": {**ROUNDS, "client_drift": Scaffold()}}
    post = MemoryPost(misbehaving(nodes(**settings), tensors(spoil)))
    run = server(post, **settings).fit()
    assert "values of mean_gradient are not finite" in of(run.rows[1], "bob")["reason"]
    assert run.adapter.isfinite().all()
    assert set(run.rounds.server._drift.client_controls) == {0, 2, 3}  # type: ignore[union-attr]


# ---- answers of other rounds and nodes -----------------------------------------------------------


def test_an_update_of_an_earlier_round_is_refused(
    honest_nodes: dict[int, Node], server: ServerMaker
) -> None:
    kept: list[Letter] = []

    def repeat(letter: Letter) -> Letter:
        kept.append(letter)
        return kept[0]

    run = server(MemoryPost(misbehaving(honest_nodes, repeat)), rounds=ROUNDS).fit()
    assert of(run.rows[0], "bob")["status"] == "ok"
    assert of(run.rows[1], "bob")["status"] == "refused"
    assert of(run.rows[1], "bob")["reason"] == "the ticket is not that of the order"


class Rewired(MemoryPost):
    """What comes back on a letter may be changed on its way."""

    def __init__(
        self, members: dict[int, Node], change: Callable[[Delivery], list[Delivery]]
    ) -> None:
        super().__init__(members)
        self.change = change

    def answers(self, ticket: str, node: int, letter: Letter) -> list[Delivery]:
        found = super().answers(ticket, node, letter)
        if letter.facts["kind"] != VISIT or node != BOB:
            return found
        return [new for each in found for new in self.change(each)]


def test_an_answer_from_another_node_is_refused(
    honest_nodes: dict[int, Node], server: ServerMaker
) -> None:
    post = Rewired(honest_nodes, lambda delivery: [delivery._replace(node=14)])
    run = server(post, rounds=ROUNDS).fit()
    assert of(run.rows[0], "bob") == {
        "client": "bob",
        "status": "refused",
        "reason": "node 14 answered in the place of node 12",
    }


def test_an_answer_that_comes_twice_counts_once_and_is_named(
    honest_nodes: dict[int, Node], server: ServerMaker
) -> None:
    once = server(MemoryPost(honest_nodes), "once", rounds=ROUNDS).fit()
    twice = server(Rewired(honest_nodes, lambda each: [each, each]), rounds=ROUNDS).fit()
    assert torch.equal(twice.adapter, once.adapter)
    for row, expected in zip(twice.rows, once.rows, strict=True):
        assert row.pop("strays") == [
            {"client": "node 12", "status": "refused", "reason": "nobody asked it for this"}
        ]
        assert row.pop("bytes_up") > expected.pop("bytes_up")
        assert row == expected


# ---- slow and gone -------------------------------------------------------------------------------


def test_a_round_ends_at_its_deadline_and_a_late_answer_is_turned_away(
    honest_nodes: dict[int, Node], server: ServerMaker
) -> None:
    post = MemoryPost(honest_nodes)

    def hold_back(node: int, letter: Letter) -> None:
        """Bob's first answer comes in the second round, which began without him."""
        where = letter.facts["kind"], letter.facts.get("round"), node
        post.held_back = {(VISIT, 0, BOB): {BOB}, (VISIT, 1, 11): set()}.get(where, post.held_back)

    post.on_send = hold_back
    fleet = {"deadline_seconds": 2.0}
    run = server(post, rounds=ROUNDS, trainer={"max_epochs": 3}, fleet=fleet).fit()
    first, second, third = run.rows
    assert of(first, "bob")["status"] == "late"
    assert of(first, "bob")["reason"] == "no answer within 2 s"
    assert [each["client"] for each in second["clients"]] == ["ada", "cyd", "dee"]
    assert of(third, "bob")["status"] == "ok"
    assert second["strays"] == [
        {
            "client": "bob",
            "status": "late",
            "reason": "its answer of round 1 came when that was over",
        }
    ]
    visit = 4 * run.adapter.numel()
    assert 4 * visit < second["bytes_up"] < 4.2 * visit  # what is turned away counts as it came


def test_a_round_ends_as_soon_as_its_target_is_reached(
    honest_nodes: dict[int, Node], server: ServerMaker
) -> None:
    post = MemoryPost(honest_nodes)
    post.on_send = lambda node, letter: (
        post.held_back.add(BOB) if letter.facts["kind"] == VISIT else None
    )
    run = server(post, rounds=ROUNDS, fleet={"target_clients": 3}).fit()
    assert of(run.rows[0], "bob") == {
        "client": "bob",
        "status": "late",
        "reason": "the round ended with 3 other updates",
    }
    assert [each["client"] for each in run.rows[1]["clients"]] == ["ada", "cyd", "dee"]
    asked = [node for node, letter in post.sent if letter.facts["kind"] == VISIT]
    assert asked.count(BOB) == 1  # it is still at the first order


def test_a_busy_node_is_asked_where_there_are_too_few_others(
    honest_nodes: dict[int, Node], server: ServerMaker
) -> None:
    post = MemoryPost(honest_nodes)
    post.on_send = lambda node, letter: (
        post.held_back.add(BOB)
        if letter.facts["kind"] == VISIT and letter.facts["round"] == 0
        else post.held_back.discard(BOB)
    )
    fleet = {"target_clients": 3, "min_clients": 3}
    post.members.pop(14)
    run = server(post, rounds=ROUNDS, fleet={**fleet, "deadline_seconds": 2.0})
    with pytest.raises(ValueError, match="has 2 updates and needs 3"):
        run.fit()


def test_a_node_that_was_started_again_between_two_looks_has_lost_its_order(
    honest_nodes: dict[int, Node], server: ServerMaker
) -> None:
    post = MemoryPost(honest_nodes)

    def restart(node: int, letter: Letter) -> None:
        if (letter.facts["kind"], letter.facts.get("round"), node) == (VISIT, 0, BOB):
            post.lost.add(BOB)  # killed, and there again before anyone looks
            post.since[BOB] = "later"

    post.on_send = restart
    run = server(post, rounds=ROUNDS, fleet={"grace_seconds": 0.1, "deadline_seconds": 60}).fit()
    reason = "its node was started again, and the order was lost"
    assert of(run.rows[0], "bob") == {"client": "bob", "status": "failed", "reason": reason}
    assert of(run.rows[1], "bob")["status"] == "ok"


def test_a_node_that_goes_away_in_a_round_is_not_waited_for_and_comes_back(
    honest_nodes: dict[int, Node], server: ServerMaker
) -> None:
    post = MemoryPost(honest_nodes)

    def vanish(node: int, letter: Letter) -> None:
        kind, round_ = letter.facts["kind"], letter.facts.get("round")
        if (kind, round_, node) == (VISIT, 0, BOB):
            post.held_back.add(BOB)
        elif (kind, round_, node) == (VISIT, 0, 14):
            del post.members[BOB]  # killed while it trains
        elif (kind, round_, node) == (VISIT, 1, 11):  # another process, another number
            post.members[99] = honest_nodes[BOB]

    post.on_send = vanish
    run = server(post, rounds=ROUNDS, trainer={"max_epochs": 3}, fleet={"grace_seconds": 0.1}).fit()
    assert [[c["client"] for c in row["clients"]] for row in run.rows] == [
        ["ada", "cyd", "dee", "bob"],
        ["ada", "cyd", "dee"],
        ["ada", "bob", "cyd", "dee"],
    ]
    assert of(run.rows[0], "bob")["reason"] == "its node can no longer be reached"
    assert of(run.rows[2], "bob")["status"] == "ok"
    orders = [sent.facts for node, sent in post.sent if node == 99 and sent.facts["kind"] == VISIT]
    assert [order["client"] for order in orders] == [1]  # as before


def test_a_node_that_is_gone_now_and_then_is_waited_for(
    honest_nodes: dict[int, Node], server: ServerMaker
) -> None:
    """Its absences are short, one after another; together they are long."""
    post = MemoryPost(honest_nodes)
    looks = 0

    def hold_back(node: int, letter: Letter) -> None:
        if letter.facts["kind"] == VISIT and letter.facts["round"] == 0:
            post.held_back.add(BOB)

    def nodes() -> list[int]:
        nonlocal looks
        looks += bool(post.held_back)
        if looks > 400:
            post.held_back.clear()
        return [node for node in honest_nodes if node != BOB or not looks % 2]

    post.on_send = hold_back
    post.nodes = nodes  # type: ignore[method-assign]
    run = server(post, rounds=ROUNDS, fleet={"grace_seconds": 0.3}).fit()
    assert of(run.rows[0], "bob")["status"] == "ok"


def test_a_client_that_failed_is_greeted_again_before_it_is_asked_again(
    honest_nodes: dict[int, Node], server: ServerMaker
) -> None:
    """Its trainer may have been started anew, with other data."""
    post = MemoryPost(misbehaving(honest_nodes, never))
    server(post, rounds=ROUNDS).fit()
    kinds = [letter.facts["kind"] for node, letter in post.sent if node == BOB]
    assert kinds[:4] == [HELLO, VISIT, HELLO, VISIT]


def test_an_order_that_cannot_be_sent_is_told(
    honest_nodes: dict[int, Node], server: ServerMaker
) -> None:
    post = MemoryPost(honest_nodes)
    post.on_send = lambda node, letter: (
        post.members.pop(BOB, None) if letter.facts["kind"] == VISIT else None
    )
    run = server(post, rounds=ROUNDS, trainer={"max_epochs": 1}).fit()
    assert of(run.rows[0], "bob")["reason"] == "its order could not be sent"
    assert run.rows[0]["bytes_down"] == 3 * 4 * run.adapter.numel()


def test_a_post_that_fails_for_a_node_is_told(
    honest_nodes: dict[int, Node], server: ServerMaker
) -> None:
    def answer(letter: Letter) -> Letter:
        if letter.facts["kind"] == VISIT:
            raise ConnectionError("the line\x1b[2J is cut")
        return honest_nodes[BOB](letter)

    run = server(MemoryPost({**honest_nodes, BOB: answer}), rounds=ROUNDS).fit()
    assert of(run.rows[1], "bob") == {
        "client": "bob",
        "status": "failed",
        "reason": "the line?[2J is cut",
    }


def test_too_few_updates_end_the_run_and_say_who_and_why(
    honest_nodes: dict[int, Node], server: ServerMaker
) -> None:
    post = MemoryPost(misbehaving(honest_nodes, never))
    run = server(post, rounds=ROUNDS, fleet={"min_clients": 4})
    with pytest.raises(ValueError, match="round 1 has 3 updates and needs 4") as caught:
        run.fit()
    assert "ada gave its update" in str(caught.value)
    assert "bob failed: it failed with ValueError; its own log says why" in str(caught.value)
    assert "--ckpt_path last" in str(caught.value)
    assert not (run.folder / "rounds.jsonl").exists()


def test_updates_are_added_up_in_the_order_of_the_clients_whoever_is_first(
    honest_nodes: dict[int, Node], server: ServerMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[float] = []
    add = WeightedMean.add

    def note(self: WeightedMean, adapter: Tensor, *, weight: float) -> None:
        weights.append(weight)
        add(self, adapter, weight=weight)

    monkeypatch.setattr(WeightedMean, "add", note)
    post = MemoryPost(honest_nodes)
    collect = post.collect
    monkeypatch.setattr(post, "collect", lambda tickets: collect(tickets[-1:]))  # the last first
    server(post, rounds=ROUNDS, trainer={"max_epochs": 1}).fit()
    assert weights == [9.0, 4.0, 7.0, 6.0]
