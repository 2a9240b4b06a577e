"""`Visits`: sends the orders of one round, waits, and checks what comes back."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fedsafe.federated.client_drift import Correction
from fedsafe.federated.remote.checks import check_report, check_size, check_values
from fedsafe.federated.remote.facts import FAILURE, Failure, VisitOrder, VisitReport
from fedsafe.federated.remote.fleet import Fleet
from fedsafe.federated.remote.letter import Letter
from fedsafe.federated.remote.post import Delivery, Post
from fedsafe.federated.remote.reception import POLL_SECONDS, Reception
from fedsafe.federated.remote.telling import say, shown
from fedsafe.federated.remote.tensors import pack_adapter, unpack_update
from fedsafe.federated.server import NotAccepted, Update
from fedsafe.model.flat_adapter import FlatAdapter


@dataclass(frozen=True)
class Expected:
    """A visit that a client is asked for.

    Attributes:
        order: What is asked.
        node: Who is asked.
        num_steps: Optimizer steps that it should take.
        num_samples: Samples that the client said it holds.
        num_answer_tokens: Answer tokens of those.
    """

    order: VisitOrder
    node: int
    num_steps: int
    num_samples: int
    num_answer_tokens: int


class Accepted(NamedTuple):
    """An update that passed every check."""

    update: Update
    learnt: dict[str, Tensor]
    """What the client's correction against drift has learnt."""
    report: VisitReport


class Left(NamedTuple):
    """What became of a visit without an update that counts."""

    status: NotAccepted
    reason: str
    was_sent: bool = True
    bytes_up: int = 0


Outcome = Accepted | Left


class Stray(NamedTuple):
    """An answer that nobody waits for."""

    client: str
    status: NotAccepted
    reason: str
    bytes_up: int


class _UnderWay(NamedTuple):
    """A visit that a node was sent the order of."""

    expected: Expected
    sent_at: float


class _Overdue(NamedTuple):
    """A visit that was given up."""

    visit: _UnderWay
    until: float
    """How long its answer is looked for, to say that it came."""


class Visits:
    """The visits of a run, round by round.

    Args:
        post: Carries the letters.
        fleet: The settings.
        reception: Who is there; goes on greeting while visits are awaited.
        adapter: Gives names and shapes.
    """

    def __init__(
        self, post: Post, fleet: Fleet, reception: Reception, adapter: FlatAdapter
    ) -> None:
        self.strays: list[Stray] = []
        """Answers that came during the round and that nobody waited for."""
        self._post = post
        self._fleet = fleet
        self._reception = reception
        self._adapter = adapter
        self._open: dict[str, _UnderWay] = {}
        """Visits that are under way, by ticket of the post."""
        self._outcomes: dict[int, Outcome] = {}
        """By number of the client."""
        self._num_accepted = 0
        self._learns: tuple[str, ...] = ()
        """What clients give back beside their adapters."""
        self._overdue: dict[str, _Overdue] = {}
        """Visits of earlier rounds that were given up, by ticket of the post."""
        self._missing: dict[int, float] = {}
        """Nodes that were asked and are out of reach, or lost their order, and since when."""

    def free(self, nodes: Mapping[int, int], *, at_least: int) -> dict[int, int]:
        """The clients that can begin at once; call when a round begins.

        A node that is still at an order of an earlier round would come to a new one only after it,
        and be late for ever.

        Args:
            nodes: Those that are there: node by number of the client.
            at_least: With fewer, busy ones are taken too.
        """
        self.strays = []
        self._receive()
        busy = {
            visit.expected.node
            for visit, _ in self._overdue.values()
            if not self._reception.has_spoken_since(visit.expected.node, visit.sent_at)
        }
        free = {client: node for client, node in nodes.items() if node not in busy}
        return free if len(free) >= at_least else dict(nodes)

    def run(
        self,
        adapter: Tensor,
        expected: Sequence[Expected],
        *,
        correction_for: Callable[[int], Correction | None],
        on_progress: Callable[[int, int], None],
    ) -> Iterator[tuple[Expected, Outcome]]:
        """One round: send every client its order, wait, and tell what became of each visit.

        One by one, so that updates need not be kept until the last has come; but in the order of
        the visits, so that sums do not depend on who is fast.

        Args:
            adapter: The adapter to start from, flat float32, shape ``(num_params,)``.
            expected: The visits.
            correction_for: The correction of a client's gradients against drift, by its number.
            on_progress: Told how many visits are over, of how many.
        """
        self._begin(adapter, expected, correction_for)
        ends_at = time.monotonic() + self._fleet.deadline_seconds
        for place, each in enumerate(expected):
            told = -1
            while each.order.client not in self._outcomes:
                self._receive()
                self._give_up(ends_at)
                over = place + len(self._outcomes)
                if over != told:
                    on_progress(over, len(expected))
                    told = over
                if each.order.client not in self._outcomes:
                    time.sleep(POLL_SECONDS)
            yield each, self._outcomes.pop(each.order.client)

    # ---- orders ----------------------------------------------------------------------------------

    def _begin(
        self,
        adapter: Tensor,
        expected: Sequence[Expected],
        correction_for: Callable[[int], Correction | None],
    ) -> None:
        assert not self._open, "a round ended with visits under way"
        self._num_accepted, self._missing = 0, {}
        self._start = adapter
        tensors = b""
        for each in expected:
            correction = correction_for(each.order.client)
            others = correction.sent() if correction is not None else {}
            self._learns = correction.learns if correction is not None else ()
            if others or not tensors:  # all are sent the same where there is nothing of their own
                tensors = pack_adapter(
                    self._adapter, adapter, others, encoding=self._fleet.encoding
                )
            self._send(each, each.order.letter(tensors))

    def _send(self, each: Expected, letter: Letter) -> None:
        seconds = max(1.0, self._fleet.deadline_seconds)
        sent = self._post.send({each.node: letter}, expires_seconds=seconds)
        if each.node in sent:
            self._open[sent[each.node]] = _UnderWay(each, time.monotonic())
        else:
            self._settle(each, Left("failed", "its order could not be sent", was_sent=False))

    # ---- answers ---------------------------------------------------------------------------------

    def _receive(self) -> None:
        self._reception.update()
        for delivery in self._post.collect([*self._open, *self._overdue]):
            visit = self._open.pop(delivery.ticket, None)
            if visit is not None:
                self._settle(visit.expected, self._judged(visit.expected, delivery))
            else:
                self._turn_away(delivery)

    def _settle(self, each: Expected, outcome: Outcome) -> None:
        self._outcomes[each.order.client] = outcome
        if isinstance(outcome, Accepted):
            self._num_accepted += 1
            return
        say(f"round {each.order.round + 1}: {each.order.name} {outcome.status}: {outcome.reason}")
        if outcome.status != "late":
            self._reception.doubt(each.node)

    def _turn_away(self, delivery: Delivery) -> None:
        """Note an answer that nobody waits for."""
        size = len(delivery.letter.tensors) if delivery.letter is not None else 0
        overdue = self._overdue.pop(delivery.ticket, None)
        if overdue is None:
            stray = Stray(f"node {delivery.node}", "refused", "nobody asked it for this", size)
        else:
            order = overdue.visit.expected.order
            why = f"its answer of round {order.round + 1} came when that was over"
            stray = Stray(order.name, "late", why, size)
        say(f"{stray.client} {stray.status}: {stray.reason}")
        self.strays.append(stray)

    def _give_up(self, ends_at: float) -> None:
        """Stop waiting for who is late, or gone."""
        now, fleet = time.monotonic(), self._fleet
        forgotten = [ticket for ticket, each in self._overdue.items() if now >= each.until]
        self._post.forget(forgotten)
        for ticket in forgotten:
            del self._overdue[ticket]
        has_target = fleet.target_clients is not None and self._num_accepted >= fleet.target_clients
        for ticket, visit in list(self._open.items()):
            each = visit.expected
            if has_target:
                left = Left("late", f"the round ended with {self._num_accepted} other updates")
            elif now >= ends_at:
                left = Left("late", f"no answer within {fleet.deadline_seconds:g} s")
            elif self._is_lost(visit, now):
                left = Left("failed", self._why_lost(each.node))
            else:
                continue
            del self._open[ticket]
            self._overdue[ticket] = _Overdue(visit, now + fleet.deadline_seconds)
            self._settle(each, left)

    def _why_lost(self, node: int) -> str:
        if self._reception.is_reachable(node):
            return "its node was started again, and the order was lost"
        return "its node can no longer be reached"

    def _is_lost(self, visit: _UnderWay, now: float) -> bool:
        """Whether no answer is to be expected: for a while now the node is gone, or past it."""
        node = visit.expected.node
        spoke = self._reception.has_spoken_since(node, visit.sent_at)
        if self._reception.is_reachable(node) and not spoke:
            self._missing.pop(node, None)
            return False
        return now - self._missing.setdefault(node, now) >= self._fleet.grace_seconds

    # ---- checks ----------------------------------------------------------------------------------

    def _judged(self, each: Expected, delivery: Delivery) -> Outcome:
        """Whether an answer is an update that counts."""
        size = len(delivery.letter.tensors) if delivery.letter is not None else 0
        if delivery.node != each.node:
            why = f"node {delivery.node} answered in the place of node {each.node}"
            return Left("refused", why, bytes_up=size)
        if delivery.letter is None:
            return Left("failed", shown(delivery.problem))
        try:
            if delivery.letter.facts.get("kind") == FAILURE:
                error = shown(Failure.read(delivery.letter.facts).error)
                return Left("failed", f"it failed with {error}; its own log says why")
            return self._checked(each, delivery.letter)
        except (ValueError, RecursionError) as error:
            return Left("refused", shown(str(error)), bytes_up=size)

    def _checked(self, each: Expected, letter: Letter) -> Accepted:
        """The update, once everything that it says and holds was checked, the cheapest first."""
        report = VisitReport.read(letter.facts)
        check_report(
            report,
            each.order,
            num_steps=each.num_steps,
            num_samples=each.num_samples,
            num_answer_tokens=each.num_answer_tokens,
        )
        adapter, learns = self._adapter, self._learns
        num_values = adapter.num_params * (1 + len(learns))
        check_size(
            letter.tensors,
            num_tensors=len(adapter.names) + len(learns),
            num_bytes=num_values * self._fleet.bytes_per_value,
        )
        vector, learnt = unpack_update(
            adapter, letter.tensors, self._start, learns, encoding=self._fleet.encoding
        )
        check_values(vector, what="the adapter")
        for name, each_learnt in learnt.items():
            check_values(each_learnt, what=name)
        update = Update(vector, float(report.loss), report.num_steps, report.num_tokens)
        return Accepted(update, learnt, report)
