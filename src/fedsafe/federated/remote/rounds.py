"""`RemoteRounds`: the server's side of a federation whose clients train on other machines.

A round is one epoch of one Lightning fit, as in `FederatedRounds`; the clients' visits are one idle
batch of it, during which orders go out and updates come in.
"""

import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

from lightning import LightningModule, Trainer

from fedsafe.data.packing import TrainingBatch
from fedsafe.federated.partition import Partition
from fedsafe.federated.planning import make_schedule
from fedsafe.federated.remote.facts import VisitOrder, VisitReport
from fedsafe.federated.remote.filter_counts import write_filter_counts
from fedsafe.federated.remote.fleet import Fleet
from fedsafe.federated.remote.post import Post
from fedsafe.federated.remote.reception import Reception
from fedsafe.federated.remote.remote_data import RemoteData
from fedsafe.federated.remote.roster import FILE, Roster
from fedsafe.federated.remote.shared_settings import shared_settings
from fedsafe.federated.remote.visits import Accepted, Expected, Left, Visits
from fedsafe.federated.rounds import FederatedRounds
from fedsafe.federated.schedule import RoundPlan, Schedule, Visit, num_sampled
from fedsafe.federated.server_listener import RoundListener
from fedsafe.model.module import LoraLM

START_LOSS = "val/loss_start"
"""Loss of the adapter that a round begins with, on what the clients that took part hold out."""


class RemoteRounds(FederatedRounds):
    """Makes a fit of `LoraLM` on `RemoteData` the server of a federation.

    Takes the settings of `FederatedRounds`; call `connect` before the fit.
    """

    _post: Post | None = None

    def connect(self, fleet: Fleet, post: Post) -> Self:
        """Say whom to ask, and who carries the letters.

        Args:
            fleet: How many clients a round needs, and how long it waits for them.
            post: Carries the letters.

        Raises:
            ValueError: If rounds would sample fewer clients than they need, or the mode is one of
                one machine.
        """
        if self.mode != "federated":
            raise ValueError(
                f"mode is {self.mode!r}; clients on other machines can only be federated, the "
                "baselines `local` and `central` run in one place, with fedsafe fit"
            )
        fleet.check_sampling(self.clients_per_round)
        self.fleet, self._post = fleet, post
        self._left: dict[int, Left] = {}
        self._reports: list[VisitReport] = []
        self._bytes_per_value = fleet.bytes_per_value
        return self

    # ---- the round -------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TrainingBatch, batch_idx: int
    ) -> None:
        """Let the clients train; the batch that stands for their visits changes nothing itself."""
        if not batch.key.is_idle:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            return
        self._batch_started = time.perf_counter()
        self._resumed = None
        self._visit_clients(trainer)

    def _visit_clients(self, trainer: Trainer) -> None:
        """Ask those of the round's clients that are there, and take in what they give back."""
        nodes = self._visits.free(self._muster(), at_least=self.fleet.min_clients)
        self._plan = self._plan_of(nodes)
        expected = [
            self._expected(visit, nodes[visit.client])
            for visit in self._plan.visits
            if not visit.failed
        ]
        self._left, self._reports = {}, []
        visits = self._visits.run(
            self.server.adapter,
            expected,
            correction_for=self.server.correction_for,
            on_progress=lambda over, of: _tell(trainer, f"{over} of {of} clients back"),
        )
        for each, outcome in visits:
            if isinstance(outcome, Accepted):
                self._take(each, outcome)
            else:
                self._left[each.order.client] = outcome

    def _muster(self) -> dict[int, int]:
        """The node of each client that is there; everyone's samples are known now."""
        nodes = self._reception.muster()
        partition = self._roster.partition()
        number = self._num_asked(partition)
        self._schedule = replace(self._schedule, partition=partition, clients_per_round=number)
        self._partition = partition
        self._data.schedule = self._schedule
        write_filter_counts(self._roster.file.parent, self._roster.members)
        return nodes

    def _plan_of(self, nodes: Mapping[int, int]) -> RoundPlan:
        """The round, with clients sampled among those that are there."""
        there = self._roster.partition(nodes)
        number = self._num_asked(there)
        schedule = replace(self._schedule, partition=there, clients_per_round=number)
        return schedule.plan(self._round)

    def _num_asked(self, partition: Partition) -> int:
        """Clients to sample; a share of a few that are there may be fewer than a round needs."""
        number = num_sampled(self.clients_per_round, partition.num_holding)
        return max(number, self.fleet.min_clients)

    def _expected(self, visit: Visit, node: int) -> Expected:
        member = self._roster.members[visit.client]
        order = VisitOrder(
            run=self._roster.run,
            ticket=uuid.uuid4().hex,
            round=visit.round,
            num_rounds=self._schedule.num_rounds,
            client=visit.client,
            name=member.name,
            number=visit.number,
            encoding=self.fleet.encoding,
            validate=self._data.validation_share > 0,
        )
        return Expected(
            order,
            node,
            num_steps=visit.num_steps,
            num_samples=member.num_samples,
            num_answer_tokens=member.num_answer_tokens,
        )

    def _take(self, each: Expected, accepted: Accepted) -> None:
        """Hand an update to the server."""
        adapter, report = accepted.update.adapter.to(self._adapter.device), accepted.report
        correction = self.server.correction_for(each.order.client)
        if correction is not None:
            correction.take(accepted.learnt)
        self.server.receive(
            each.order.client,
            accepted.update._replace(adapter=adapter),
            name=each.order.name,
            weight=self._weight_of(report),
            num_samples=report.num_samples,
            correction=correction,
            seconds=float(report.seconds),
        )
        self._reports.append(report)

    def _weight_of(self, report: VisitReport) -> float:
        if self.weighting == "uniform":
            return 1.0
        counts = {"samples": report.num_samples, "tokens": report.num_answer_tokens}
        return float(counts[self.weighting])

    def _aggregate(self) -> None:
        if len(self._reports) < self.fleet.min_clients:
            raise ValueError(self._too_few())
        super()._aggregate()
        tokens = sum(report.start_tokens for report in self._reports)
        if tokens:
            nll = sum(float(report.start_nll) for report in self._reports)
            self._record[START_LOSS] = nll / tokens
        if self._visits.strays:
            names = ("client", "status", "reason")
            strays = [{name: getattr(each, name) for name in names} for each in self._visits.strays]
            self._record["strays"] = strays

    def _note_failures(self) -> None:
        for visit in self._plan.visits:
            name = self._partition.names[visit.client]
            left = self._left.get(visit.client)
            if left is not None:
                self.server.note_failure(
                    name, left.status, reason=left.reason, was_sent=left.was_sent
                )
                self.server.count_bytes(up=left.bytes_up)
            elif visit.failed:
                self.server.note_failure(name, was_sent=False)
        self.server.count_bytes(up=sum(each.bytes_up for each in self._visits.strays))

    def _too_few(self) -> str:
        names = self._partition.names
        reasons = [
            *(f"{report.name} gave its update" for report in self._reports),
            *(f"{names[k]} {left.status}: {left.reason}" for k, left in self._left.items()),
            *(f"{names[v.client]} failed by chance" for v in self._plan.visits if v.failed),
        ]
        return (
            f"round {self._round + 1} has {len(self._reports)} updates and needs "
            f"{self.fleet.min_clients} (fleet.min_clients): {'; '.join(reasons)}. Nothing was "
            "changed; go on from the last finished round with --ckpt_path last"
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add what was measured here to what the clients measured."""
        trainer.callback_metrics.pop(START_LOSS, None)  # the round before's
        super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the clients measured, write the round down and save its adapter."""
        if self._row is not None and START_LOSS in self._row:
            pl_module.log(START_LOSS, self._row[START_LOSS], prog_bar=True)
        super().on_train_epoch_end(trainer, pl_module)

    # ---- setting up ------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plan the run, and refuse what cannot be the server of a federation."""
        if self._post is None:
            raise ValueError("RemoteRounds has nobody to ask; call connect with a fleet and a post")
        if trainer.world_size > 1:
            raise ValueError(
                f"the server of a federation is one process, and the Trainer has "
                f"{trainer.world_size}; set trainer.devices and num_nodes to 1"
            )
        if not isinstance(trainer.datamodule, RemoteData):  # type: ignore[attr-defined]
            raise ValueError("RemoteRounds needs RemoteData: the conversations are elsewhere")
        super().setup(trainer, pl_module, stage)

    def _make_schedule(self, trainer: Trainer) -> Schedule:
        schedule = make_schedule(
            vars(self), trainer=trainer, data=self._data, layout=self._layout, elsewhere=True
        )
        return replace(schedule, num_micro=1)  # no step is taken here

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the clients before anything dear is done; make the server."""
        assert isinstance(pl_module, LoraLM)
        assert self._post is not None
        self._open(trainer, pl_module, self._post)
        super().on_train_start(trainer, pl_module)
        self._visits = Visits(self._post, self.fleet, self._reception, self._adapter)

    def _open(self, trainer: Trainer, module: LoraLM, post: Post) -> None:
        file = Path(trainer.default_root_dir) / FILE
        if self._resumed is None:
            self._log.refuse_any()  # before its roster is written over
            self._roster = Roster(file)
        else:
            self._roster = Roster.read(file)
        for name in self.fleet.clients or ():
            self._roster.add(name)
        settings = shared_settings(
            model=cast(Any, module.hparams),
            data=vars(self._data),
            federated=vars(self),
            trainer=trainer,
            base=module.peft_model,
            tokenizer=self._data.tokenizer,
        )
        self._reception = Reception(post, self.fleet, self._roster, settings=settings)
        if self._round < self._schedule.num_rounds:
            self._muster()

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "fleet.encoding": self.fleet.encoding}


def _tell(trainer: Trainer, doing: str) -> None:
    """Tell who follows the run what the clients are doing."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RoundListener):
            callback.on_clients_progress(trainer, doing)
