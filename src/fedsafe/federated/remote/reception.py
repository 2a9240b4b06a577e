"""`Reception`: who is there, and who may take part."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsafe.federated.remote.checks import check_node
from fedsafe.federated.remote.facts import FAILURE, Failure, Greeting, NodeFacts
from fedsafe.federated.remote.fleet import Fleet
from fedsafe.federated.remote.post import Delivery, Post
from fedsafe.federated.remote.roster import Roster
from fedsafe.federated.remote.shared_settings import differences, library_versions
from fedsafe.federated.remote.telling import say, shown

POLL_SECONDS = 0.2
"""How often the post is asked for answers."""
NODES_SECONDS = 1.0
"""How often it is asked who can be reached."""
RETRY_SECONDS = 30.0
"""How long after it a node that was refused is greeted again: it may have been set right."""


@dataclass
class _Node:
    """What is known of a node that can be reached."""

    since: str | None = None
    """See `Post.here_since`."""
    ticket: str | None = None
    """Of the greeting that it has not answered yet."""
    asked_at: float = 0.0
    facts: NodeFacts | None = None
    """What it said of itself; whether it may have its name is another question."""
    problem: str | None = None
    """Why it takes no part."""

    @property
    def is_being_greeted(self) -> bool:
        """Whether it has yet to say who it is."""
        return self.facts is None and self.problem is None


class Reception:
    """Greets nodes, and knows which clients can be asked to train.

    A name is bound to the node that came with it as long as that one can be reached.

    Args:
        post: Carries the letters.
        fleet: The settings.
        roster: Who has which number; new clients are added to it.
        settings: Those that a node must share, by name.
    """

    def __init__(
        self, post: Post, fleet: Fleet, roster: Roster, *, settings: Mapping[str, Any]
    ) -> None:
        self._post = post
        self._fleet = fleet
        self._roster = roster
        self._settings = settings
        self._nodes: dict[int, _Node] = {}
        """Those that can be reached."""
        self._holders = {m.name: m.node for m in roster.members if m.node is not None}
        """The node that each name is bound to, whether it can be reached or not."""
        self._looked = -math.inf
        self._has_begun = False

    def muster(self) -> dict[int, int]:
        """Wait until enough clients are there for a round; newcomers get their numbers.

        Where it is known who else should come, it waits for them too, but not for long: for all
        when a run starts or goes on, later for those that are being greeted again.

        Returns:
            The node of each client that holds samples, by the client's number, ascending.

        Raises:
            ValueError: If too few come in time; says who is missing, and why.
        """
        started, told = time.monotonic(), False
        self._looked = -math.inf
        while True:
            self.update()
            waited, here = time.monotonic() - started, len(self._holding())
            enough = here >= self._fleet.min_clients
            if enough and (waited >= self._fleet.grace_seconds or not self._is_incomplete()):
                break
            if not enough and waited >= self._fleet.patience_seconds:
                raise ValueError(self._too_few(here))
            if not enough and not told:
                say(f"{here} of {self._fleet.min_clients} clients are there; waiting for others")
                told = True
            time.sleep(POLL_SECONDS)
        self._has_begun = True
        return self._seated()

    def update(self) -> None:
        """See who came and went, greet those who are new, and read their answers."""
        if time.monotonic() - self._looked >= NODES_SECONDS:
            self._looked = time.monotonic()
            self._look(set(self._post.nodes()))
        self._read_answers()
        self._bind()
        self._greet()

    def is_reachable(self, node: int) -> bool:
        """Whether the node could be reached when it was last looked for."""
        return node in self._nodes

    def doubt(self, node: int) -> None:
        """Greet a node again before it is asked to train: something went wrong with it."""
        if node in self._nodes:
            self._begin_anew(node)

    def has_spoken_since(self, node: int, when: float) -> bool:
        """Whether the node answered a greeting of after `when` (of the monotonic clock).

        A node does one thing at a time: whatever it was asked before is over, or was lost with it.
        """
        known = self._nodes.get(node)
        return known is not None and known.facts is not None and known.asked_at > when

    def _begin_anew(self, node: int) -> None:
        """Know nothing of a node but that it is there; it is greeted next."""
        self._stop_greeting(node)
        self._nodes[node] = _Node(self._post.here_since(node))

    def _stop_greeting(self, node: int) -> None:
        """Wait no longer for what a node says of itself."""
        known = self._nodes.get(node)
        if known is not None and known.ticket:
            self._post.forget([known.ticket])
            known.ticket = None

    # ---- letters ---------------------------------------------------------------------------------

    def _look(self, reachable: set[int]) -> None:
        """Forget who is gone: a node that comes back is greeted, for its data may have changed."""
        present = self._present()
        for node in self._nodes.keys() - reachable:
            self._stop_greeting(node)
            del self._nodes[node]
            names = [name for name, other in present.items() if other == node]
            for name in names:
                say(f"{name} (node {node}) can no longer be reached")
        for node in sorted(reachable):
            known = self._nodes.get(node)
            if known is None or known.since != self._post.here_since(node):
                self._begin_anew(node)

    def _greet(self) -> None:
        letter = Greeting(self._roster.run).letter()
        for node, known in self._nodes.items():
            waited = time.monotonic() - known.asked_at
            if known.ticket or known.facts or (known.problem and waited < RETRY_SECONDS):
                continue
            sent = self._post.send({node: letter}, expires_seconds=self._fleet.patience_seconds)
            known.ticket, known.asked_at = sent.get(node), time.monotonic()

    def _read_answers(self) -> None:
        asked = {known.ticket: node for node, known in self._nodes.items() if known.ticket}
        for delivery in self._post.collect(list(asked)):
            node = asked.get(delivery.ticket)
            if node is None:
                continue
            known = self._nodes[node]
            known.ticket = None
            try:
                known.facts, known.problem = self._checked(node, delivery), None
            except (ValueError, RecursionError) as error:
                self._refuse(node, shown(str(error)))
        for node, known in self._nodes.items():
            waited = time.monotonic() - known.asked_at
            if known.ticket and waited > self._fleet.patience_seconds:
                self._stop_greeting(node)
                self._refuse(node, "it did not answer when it was greeted")

    def _checked(self, node: int, delivery: Delivery) -> NodeFacts:
        """What a node says of itself, if it may take part."""
        if delivery.node != node:
            raise ValueError(f"node {delivery.node} answered in its place")
        if delivery.letter is None:
            raise ValueError(delivery.problem)
        facts = delivery.letter.facts
        if facts.get("kind") == FAILURE:
            raise ValueError(f"it failed with {Failure.read(facts).error}; its own log says why")
        said = NodeFacts.read(facts)
        check_node(said, run=self._roster.run, names=self._fleet.clients)
        vouched = self._post.vouched_name(node)
        if vouched not in (None, said.client):
            raise ValueError(f"it calls itself {said.client}, and its key is {vouched}'s")
        others = differences(said.settings, self._settings)
        if others:
            raise ValueError(f"{said.client}: {'; '.join(others)}; all must share these")
        ours = library_versions()
        theirs = {name: said.versions[name] for name in ours if name in said.versions}
        for line in differences(theirs, ours):
            say(f"{said.client} (node {node}) has another version: {shown(line)}")
        return said

    def _refuse(self, node: int, why: str) -> None:
        if self._nodes[node].problem != why:
            say(f"node {node} is refused: {why}")
        self._nodes[node].problem = why

    # ---- names and numbers -----------------------------------------------------------------------

    def _bind(self) -> None:
        """Give names that are free to the nodes that claim them."""
        for node, known in self._nodes.items():
            if known.facts is None:
                continue
            name = known.facts.client
            holder = self._holder_of(name)
            if holder is None:
                self._holders[name], known.problem = node, None
            elif holder != node and known.problem is None:
                self._refuse(node, f"it calls itself {name}, as node {holder} does")

    def _holder_of(self, name: str) -> int | None:
        """The node that a name is bound to, if it can be reached and has not given the name up."""
        node = self._holders.get(name)
        known = self._nodes.get(node) if node is not None else None
        if known is None or (known.facts is None and known.problem is not None):
            return None
        return node if known.facts is None or known.facts.client == name else None

    def _present(self) -> dict[str, int]:
        """The clients that said what they hold, and can be reached: node by name."""
        return {
            known.facts.client: node
            for node, known in self._nodes.items()
            if known.facts is not None and self._holders.get(known.facts.client) == node
        }

    def _holding(self) -> list[str]:
        return [name for name, node in self._present().items() if self._said(node).num_samples]

    def _said(self, node: int) -> NodeFacts:
        facts = self._nodes[node].facts
        assert facts is not None
        return facts

    def _is_incomplete(self) -> bool:
        """Whether someone is missing who should be here soon."""
        names = {member.name for member in self._roster.members}
        being_greeted = {node for node, known in self._nodes.items() if known.is_being_greeted}
        if self._has_begun:
            return any(self._holders.get(name) in being_greeted for name in names)
        expected = names | set(self._fleet.clients or ())
        return bool(being_greeted or expected - self._present().keys())

    def _seated(self) -> dict[int, int]:
        """Number the newcomers, by name; note what everyone holds."""
        present = self._present()
        known = [name for name in present if self._roster.number_of(name) is not None]
        for name in [*known, *sorted(present.keys() - set(known))]:
            self._seat(name, present[name])
        numbers = {self._roster.add(name): present[name] for name in self._holding()}
        return dict(sorted(numbers.items()))

    def _seat(self, name: str, node: int) -> None:
        number, said = self._roster.add(name), self._said(node)
        member = self._roster.members[number]
        held = (member.node, member.num_samples, member.num_answer_tokens)
        if held == (node, said.num_samples, said.num_answer_tokens):
            return
        samples = f"{said.num_samples:,} samples"
        if member.node is not None and member.num_samples != said.num_samples:
            samples += f", {member.num_samples:,} before"
        if not said.num_samples:
            samples += ": it takes no part"
        say(f"{name} is client {number}, at node {node}, with {samples}")
        member.node = node
        member.num_samples = said.num_samples
        member.num_answer_tokens = said.num_answer_tokens
        member.filtered = said.filtered
        self._roster.write()

    def _too_few(self, here: int) -> str:
        names = [*(self._fleet.clients or ()), *(member.name for member in self._roster.members)]
        missing = [name for name in dict.fromkeys(names) if name not in self._present()]
        empty = self._present().keys() - set(self._holding())
        silent = [node for node, known in self._nodes.items() if known.is_being_greeted]
        reasons = [
            *(f"{name} is not there" for name in missing),
            *(f"{name} has no sample" for name in sorted(empty)),
            *(f"node {n}: {known.problem}" for n, known in self._nodes.items() if known.problem),
            *(f"node {node} has not said who it is" for node in silent),
        ]
        told = "; ".join(reasons) or "no other node has come"
        return (
            f"a round needs {self._fleet.min_clients} clients (fleet.min_clients), and after "
            f"{self._fleet.patience_seconds:g} s {here} are there ({told}); start the others, then "
            "go on with --ckpt_path last"
        )
