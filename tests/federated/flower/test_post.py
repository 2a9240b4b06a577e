"""`FlowerPost` over a grid of three nodes that is no network."""

import time
from collections.abc import Iterable

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")

from flwr.app import Message, RecordDict
from flwr.app.error import Error
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from fedsafe.federated.flower.post import FlowerPost
from fedsafe.federated.flower.records import to_records
from fedsafe.federated.remote.letter import Letter
from fedsafe.federated.remote.post import Delivery

HELLO = Letter({"kind": "hello"}, b"tensors")


class FakeGrid:
    """Answers as it is told to; a ticket that was answered once is an error, as with Flower."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.answers: dict[str, Message | Exception] = {}
        self.asked: list[str] = []
        self.slow: set[str] = set()
        self.back_at = "2025-01-01T00:00:00"

    def get_nodes(self) -> Iterable[NodeInfo]:
        ada = NodeInfo(node_id=11, name="ada", last_activated_at=self.back_at)
        return [NodeInfo(node_id=12), ada, NodeInfo(node_id=13)]

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        self.sent += messages
        return [self._ticket(each) for each in messages]

    @staticmethod
    def _ticket(message: Message) -> str | None:
        node = message.metadata.dst_node_id
        return None if node == 99 else f"ticket-{node}"

    def pull_messages(self, tickets: Iterable[str]) -> list[Message]:
        (ticket,) = tickets
        self.asked.append(ticket)
        while ticket in self.slow:
            time.sleep(0.01)
        answer = self.answers.get(ticket)
        if isinstance(answer, Exception):
            raise answer
        return [answer] if answer is not None else []

    def answer(self, node: int, content: RecordDict | Error, *, sender: int | None = None) -> None:
        asked = next(each for each in self.sent if each.metadata.dst_node_id == node)
        asked.metadata.__dict__["_message_id"] = f"ticket-{node}"
        message = Message(content, reply_to=asked)
        message.metadata.__dict__["_src_node_id"] = node if sender is None else sender
        self.answers[f"ticket-{node}"] = message


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> FakeGrid:
    for name in ("_task_id", "_run_id", "_node_id"):  # as in a process of Flower's
        monkeypatch.setattr(TaskIdentity, name, 1)
    return FakeGrid()


@pytest.fixture
def post(grid: FakeGrid) -> FlowerPost:
    return FlowerPost(grid)  # type: ignore[arg-type]


def collected(post: FlowerPost, *tickets: str, number: int) -> list[Delivery]:
    """What comes on the tickets, once so many have come."""
    found: list[Delivery] = []
    until = time.monotonic() + 10
    while len(found) < number:
        assert time.monotonic() < until, found
        found += post.collect(tickets)
        time.sleep(0.02)
    return found


def test_nodes_are_told_in_order(post: FlowerPost) -> None:
    assert post.nodes() == [11, 12, 13]


def test_a_letter_goes_to_each_node_and_expires(post: FlowerPost, grid: FakeGrid) -> None:
    tickets = post.send({11: HELLO, 12: HELLO}, expires_seconds=42.0)
    assert tickets == {11: "ticket-11", 12: "ticket-12"}
    assert [each.metadata.dst_node_id for each in grid.sent] == [11, 12]
    assert {each.metadata.ttl for each in grid.sent} == {42.0}
    assert grid.sent[0].content == to_records(HELLO)


def test_a_node_that_is_gone_gets_no_ticket(post: FlowerPost) -> None:
    assert post.send({99: HELLO, 12: HELLO}, expires_seconds=1.0) == {12: "ticket-12"}


def test_an_answer_is_delivered_once(post: FlowerPost, grid: FakeGrid) -> None:
    post.send({11: HELLO, 12: HELLO}, expires_seconds=1.0)
    assert post.collect(["ticket-11", "ticket-12"]) == []
    grid.answer(12, to_records(HELLO))
    assert collected(post, "ticket-11", "ticket-12", number=1) == [Delivery("ticket-12", 12, HELLO)]
    asked = grid.asked.count("ticket-12")
    time.sleep(0.3)
    assert post.collect(["ticket-12"]) == []
    assert grid.asked.count("ticket-12") == asked  # Flower would answer with an error


def test_nobody_waits_for_a_node_that_is_still_sending(post: FlowerPost, grid: FakeGrid) -> None:
    post.send({11: HELLO, 12: HELLO}, expires_seconds=1.0)
    grid.slow.add("ticket-11")
    grid.answer(11, to_records(HELLO))
    grid.answer(12, to_records(HELLO))
    tickets = ("ticket-11", "ticket-12")
    assert [each.node for each in collected(post, *tickets, number=1)] == [12]
    assert grid.asked.count("ticket-11") == 1
    grid.slow.clear()
    assert [each.node for each in collected(post, *tickets, number=1)] == [11]


def test_tickets_of_others_are_not_asked_for(post: FlowerPost, grid: FakeGrid) -> None:
    assert post.collect(["ticket-11", "elsewhere"]) == []
    assert grid.asked == []


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("Error: Message Unavailable - It may have expired. More.\nStill", "Message Unavailable"),
        ("<class 'ValueError'>:<'no'>", "ValueError"),
        (None, "Flower gave no reason"),
    ],
    ids=["long", "exception", "none"],
)
def test_a_failure_of_flower_is_a_problem_in_one_line(
    reason: str | None, told: str, post: FlowerPost, grid: FakeGrid
) -> None:
    post.send({11: HELLO}, expires_seconds=1.0)
    grid.answer(11, Error(code=3, reason=reason))
    (delivery,) = collected(post, "ticket-11", number=1)
    assert delivery.letter is None
    assert told in delivery.problem
    assert "\n" not in delivery.problem
    assert "More" not in delivery.problem


def test_an_answer_that_is_no_letter_is_a_problem(post: FlowerPost, grid: FakeGrid) -> None:
    post.send({11: HELLO}, expires_seconds=1.0)
    grid.answer(11, RecordDict())
    (delivery,) = collected(post, "ticket-11", number=1)
    assert delivery.letter is None
    assert "no facts of a letter" in delivery.problem


def test_an_answer_of_another_node_is_a_problem(post: FlowerPost, grid: FakeGrid) -> None:
    post.send({11: HELLO}, expires_seconds=1.0)
    grid.answer(11, to_records(HELLO), sender=13)
    (delivery,) = collected(post, "ticket-11", number=1)
    assert delivery == Delivery("ticket-11", 13, None, "node 13 answered in the place of 11")


def test_a_broken_connection_is_a_problem_of_that_letter(post: FlowerPost, grid: FakeGrid) -> None:
    post.send({11: HELLO}, expires_seconds=1.0)
    grid.answers["ticket-11"] = ConnectionError("no route to a host whose name is secret")
    (delivery,) = collected(post, "ticket-11", number=1)
    assert delivery.problem == "Flower failed with ConnectionError"


def test_a_node_has_the_name_that_its_key_was_registered_with(post: FlowerPost) -> None:
    assert post.nodes() == [11, 12, 13]
    assert [post.vouched_name(node) for node in (11, 12, 99)] == ["ada", None, None]


def test_a_ticket_that_was_forgotten_brings_nothing(post: FlowerPost, grid: FakeGrid) -> None:
    post.send({11: HELLO, 12: HELLO}, expires_seconds=1.0)
    grid.slow.add("ticket-11")
    grid.answer(11, to_records(HELLO))
    assert post.collect(["ticket-11"]) == []
    post.forget(["ticket-11", "ticket-12"])
    grid.slow.clear()
    time.sleep(0.1)
    assert post.collect(["ticket-11", "ticket-12"]) == []
    assert [post._ready, post._open, post._asked] == [{}, {}, {}]


def test_a_node_that_came_back_is_known_by_its_time(post: FlowerPost, grid: FakeGrid) -> None:
    post.nodes()
    before = [post.here_since(node) for node in (11, 12)]
    grid.back_at = "2026-01-01T00:00:00"
    post.nodes()
    assert before[0] != post.here_since(11) == grid.back_at
    assert before[1] == post.here_since(12)
    assert post.here_since(99) is None
