"""`FederatedRounds`: one Lightning epoch is one federated round, clients at boundaries inside it.

The round, as in McMahan et al. (2017), Algorithm 1 (https://arxiv.org/abs/1602.05629):

    for each round t:
        S_t = sampled clients
        for each client k in S_t:  w_k = local training from x_t     (batches of the epoch)
        x_{t+1} = server optimizer(x_t, sum_k n_k w_k / sum_k n_k)
        x_{t+1} = constitutional training(x_{t+1})                   (optional; one more batch)
                                                                     (validation comes last)
"""

import time
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from torch import Tensor

from fedsafe.data.datamodule import GLOBAL_ADAPTER
from fedsafe.data.packing import TrainingBatch
from fedsafe.federated.agreement import agreed_adapter, check_agreement, check_same_adapter
from fedsafe.federated.client_drift import ClientDrift
from fedsafe.federated.constitutional_server import ConstitutionalServer
from fedsafe.federated.constitutional_training import ConstitutionalTraining
from fedsafe.federated.exchange import RoundExchange
from fedsafe.federated.local_training import LocalTraining
from fedsafe.federated.planning import checked_data, make_schedule, weight_of
from fedsafe.federated.round_evaluation import RoundEvaluation
from fedsafe.federated.round_identity import (
    identity_of_run,
    refuse_unfit,
    rules_of_round,
    settings_of_rank,
)
from fedsafe.federated.round_log import RoundLog
from fedsafe.federated.run_files import own_adapters, save_adapters, save_base_with_tokenizer
from fedsafe.federated.schedule import RoundPlan, Schedule
from fedsafe.federated.server import Server
from fedsafe.federated.server_optimizer import FedAvg, ServerOptimizer
from fedsafe.federated.server_steps import NonFiniteLossError
from fedsafe.federated.server_visit import ServerVisit
from fedsafe.federated.trainer_settings import check_trainer
from fedsafe.model.module import LoraLM
from fedsafe.strategies.layout import exchange_of, layout_of


class FederatedRounds(RoundEvaluation):
    """Makes a fit of `LoraLM` on a `FederatedDataModule` federated.

    `max_epochs` of the Trainer is the number of rounds.

    Args:
        clients_per_round: Clients sampled each round: a whole number, or a share up to 1.0 (all).
        local_steps: Optimizer steps of a visit; give this or `local_epochs`.
        local_epochs: Passes over a client's samples in a visit.
        mode: `federated`; `local` never averages, each client goes on alone; `central` puts all
            samples in one client, whose optimizer is kept unless the server trains in between, with
            as many steps a round as the federation takes on average.
        weighting: What a client's weight in the mean is: its samples, its answer tokens, or 1.
        server_optimizer: What the server does with the clients' mean.
        client_drift: Correction of local gradients against client drift; None is none.
        cai: Constitutional training of the global adapter after the average, on the data that
            `data.cai` describes; None is none.
        failure_probability: Chance that a sampled client fails and returns nothing, 0 to 1.
        seed: Seed of the sampled clients, of their batches' order and of failures.
    """

    _bytes_per_value = 4

    def __init__(  # noqa: PLR0913
        self,
        clients_per_round: int | float = 2,
        local_steps: int | None = None,
        local_epochs: int | None = None,
        mode: Literal["federated", "local", "central"] = "federated",
        weighting: Literal["samples", "tokens", "uniform"] = "samples",
        server_optimizer: ServerOptimizer | None = None,
        client_drift: ClientDrift | None = None,
        cai: ConstitutionalTraining | None = None,
        failure_probability: float = 0.0,
        seed: int = 0,
    ) -> None:
        if mode != "federated" and (server_optimizer is not None or client_drift is not None):
            raise ValueError(
                f"mode {mode!r} has no federated server; "
                "leave server_optimizer and client_drift out"
            )
        if mode == "local" and cai is not None:
            raise ValueError(
                "mode 'local' has no global adapter for the server to train; leave cai out"
            )
        if local_steps is None and local_epochs is None:
            local_epochs = 1
        self.clients_per_round = clients_per_round
        self.local_steps = local_steps
        self.local_epochs = local_epochs
        self.mode = mode
        self.weighting = weighting
        self.server_optimizer = server_optimizer if server_optimizer is not None else FedAvg()
        self.client_drift = client_drift
        self.cai = cai
        self.failure_probability = failure_probability
        self.seed = seed
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._resumed: dict[str, Any] | None = None
        self._local: LocalTraining | None = None
        self._server_visit: ServerVisit | None = None
        self._record: dict[str, Any] = {}
        self._pairs_before: dict[str, Any] | None = None
        self._row: dict[str, Any] | None = None
        self._elapsed = 0.0
        self._fitting = False
        self._to_evaluate: Tensor | None = None

    # ---- the round -------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TrainingBatch, batch_idx: int
    ) -> None:
        """Begin a visit: the client gets the global adapter and a fresh optimizer.

        The server's own visit takes place here; the batch that stands for it changes nothing.
        """
        self._batch_started = time.perf_counter()
        if batch.key.is_server_visit:
            self._visit_server(trainer, pl_module)
            return
        if batch.key.is_idle:
            return
        client = batch.key.client
        if self._local is None:
            correction = self.server.correction_for(client)
            self._local = LocalTraining(
                self._adapter, trainer.optimizers[0], correction, peers=self._layout.data
            )
        if batch.key.starts_visit:
            alone = self._schedule.server_visits != "every"  # no server trained in between
            goes_on = self.mode == "central" and batch.key.round > 0 and alone
            self._local.begin(self.server.start_of(client), fresh_optimizer=not goes_on)
        elif self._resumed is not None:
            self._local.load_state_dict(self._resumed["local"])
        self._resumed = None

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Correct the gradients against client drift."""
        if self._local is not None:
            self._local.correct_gradients()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: TrainingBatch,
        batch_idx: int,
    ) -> None:
        """End a visit: the server takes its update. After the last one, average; end the round."""
        self._batches_done += 1
        if self._local is not None:
            self._local.record(outputs["nll_sum"], num_tokens=len(batch.targets))
            if batch.key.ends_visit:
                self._end_visit(batch.key.client)
        self._elapsed += time.perf_counter() - self._batch_started
        if self._batches_done == self._plan.num_client_batches:
            self._aggregate()
        if self._batches_done == len(self._plan):
            self._end_round()

    def _end_visit(self, client: int) -> None:
        assert self._local is not None
        self._exchange.receive(
            client,
            self._local.finish(),
            name=self._partition.names[client],
            weight=weight_of(client, self.weighting, schedule=self._schedule, data=self._data),
            num_samples=len(self._partition.samples_of(client)),
            correction=self._local.correction,
        )
        self._local = None

    def _aggregate(self) -> None:
        self._exchange.settle(self._plan.owners)
        self._note_failures()
        self._record = self.server.close_round(num_clients=self._partition.num_holding)
        if self.mode != "federated":
            self._record |= {"bytes_up": 0, "bytes_down": 0}  # no adapter travels
        check_same_adapter(self._layout.world, self.server.adapter, round_=self._round)
        self._adapter.write(self.server.adapter)

    def _note_failures(self) -> None:
        for visit in self._plan.visits:
            if visit.failed:
                self.server.note_failure(self._partition.names[visit.client])

    def _visit_server(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train the average on revised answers, or go on where a checkpoint left off."""
        saved, self._resumed = self._resumed, None
        self._server_visit = self._constitutional.begin(self._round, saved)
        try:
            record = self._server_visit.run()
        except NonFiniteLossError as error:
            self._adapter.write(self.server.adapter)
            self._save_adapters(trainer, pl_module)
            raise ValueError(
                f"{error}; adapter/ holds the average of the round's clients. Lower the learning "
                "rates of federated.cai, and resume or start anew"
            ) from error
        self._server_visit = None
        trained = agreed_adapter(self._layout.world, self._adapter.read(), round_=self._round)
        self._adapter.write(trained)
        change = (trained - self.server.adapter).norm().item()
        self._record |= {"cai": {**record, "update_norm": change}}
        self.server.adapter = trained

    def _end_round(self) -> None:
        record, self._record = self._record, {}
        self._row = {"round": self._round + 1, **record, "seconds": round(self._elapsed, 3)}
        if self._round == 0 and self._pairs_before is not None:
            self._row["cai_before"] = self._pairs_before
        if self.mode == "local":
            self._data.validated_clients[:] = [v.client for v in self._plan.visits]
        self._elapsed = 0.0
        self._go_to(self._round + 1, batches_done=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the round down and save its adapter."""
        if self._row is None:
            return
        pl_module.log("train/loss", self._row["loss"], prog_bar=True)
        self._write_round(trainer, pl_module)

    def _write_round(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._row is not None
        self._save_adapters(trainer, pl_module)
        if trainer.is_global_zero:
            self._log.append(self._row)
        self._row = None

    # ---- setting up ------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plan the run, and refuse a Trainer under which rounds would go wrong silently."""
        self._start_afresh()
        self._fitting = stage == "fit"
        self._layout = layout_of(trainer.strategy)
        if not self._fitting:
            return
        check_trainer(trainer, corrects_gradients=self.client_drift is not None)
        self._data = data = checked_data(trainer, pl_module, cai=self.cai)
        given = settings_of_rank(
            vars(self), trainer=trainer, model=pl_module.hparams, layout=self._layout
        )
        check_agreement(self._layout.world, {**data.identity(), **given})
        self._schedule = self._make_schedule(trainer)
        self._partition = self._schedule.partition
        data.schedule = self._schedule
        num_adapters = self._schedule.clients_per_round if self.mode == "local" else 1
        data.validated_clients = [GLOBAL_ADAPTER] * num_adapters
        self._log = RoundLog(Path(trainer.default_root_dir) / "rounds.jsonl")
        self._go_to(0, batches_done=0)

    def _make_schedule(self, trainer: Trainer) -> Schedule:
        return make_schedule(vars(self), trainer=trainer, data=self._data, layout=self._layout)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse samples that the model cannot read."""
        assert isinstance(pl_module, LoraLM)
        pl_module.check_data(
            vocab_size=len(self._data.tokenizer),
            longest=self._data.longest,
            largest_id=self._data.largest_id,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the server, from the fresh adapter or from the checkpoint."""
        assert isinstance(pl_module, LoraLM)
        stands = {"round": self._round, "batches_done": self._batches_done}
        check_agreement(self._layout.world, stands)  # disks may hold different checkpoints
        self._adapter, self._optimizer = pl_module.flat_adapter(), trainer.optimizers[0]
        self.server = Server(
            self._layout.world.broadcast_(self._adapter.read(), source=0),
            optimizer=self.server_optimizer,
            drift=self.client_drift,
            isolated=self.mode == "local",
            bytes_per_value=self._bytes_per_value,
        )
        mode, layout = exchange_of(trainer.strategy), self._layout
        self._exchange = RoundExchange(self.server, layout.clients, mode, group=layout.data)
        if self._resumed is not None:
            self.server.load_state_dict(self._resumed["server"])
            self._restore(self._resumed["training"])
        else:
            self._log.refuse_any()
        if trainer.is_global_zero:
            self._log.keep(self._round - (self._row is not None))
            self._data.write_verdicts(Path(trainer.default_root_dir))
            if pl_module.hparams["from_config"] is not None:  # a base that exists nowhere else
                folder = Path(trainer.default_root_dir) / "base"
                save_base_with_tokenizer(pl_module, self._data.tokenizer, folder=folder)
        if self.cai is not None:
            assert self._data.cai is not None
            self._constitutional = ConstitutionalServer(
                self.cai, self._data.cai, trainer=trainer, module=pl_module, seed=self.seed
            )
            self._pairs_before = self._constitutional.start(self._resumed)
        if self._row is not None:  # killed between the round's last batch and its end
            self._write_round(trainer, pl_module)
            # Lightning begins afresh only if it has done as many batches as the new round has
            trainer.fit_loop.epoch_loop.batch_progress.current.completed = len(self._plan)

    def _go_to(self, round_: int, *, batches_done: int) -> None:
        self._round, self._batches_done = round_, batches_done
        self._plan: RoundPlan = self._schedule.plan(round_)
        self._data.position = (round_, batches_done)

    # ---- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The server, and where the run stands; the same on all ranks.

        Raises:
            ValueError: If ranks that train different clients are in the middle of a round.
        """
        if self._layout.clients.size > 1 and self._batches_done:
            raise ValueError(
                "clients in parallel are checkpointed between rounds alone: each rank holds other "
                "clients' training; leave checkpoint.every_n_steps out"
            )
        visit = self._server_visit
        return {
            "identity": self._identity(),
            "rules_of_round": self._rules_of_round(),
            "round": self._round,
            "batches_done": self._batches_done,
            "server": self.server.state_dict(),
            "training": self._training() if self._batches_done or self.mode == "central" else None,
            "local": self._local.state_dict() if self._local is not None else None,
            "server_visit": visit.state_dict() if visit is not None else None,
            "record": self._record,
            "pairs_before": self._pairs_before,
            "row": self._row,
            "elapsed": self._elapsed + (visit.seconds if visit is not None else 0.0),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Position the data at once; the server follows when the model is on its device."""
        if not self._fitting:
            self._to_evaluate = state_dict["server"]["adapter"]
            return
        current = {"identity": self._identity(), "rules_of_round": self._rules_of_round()}
        refuse_unfit(state_dict, current, layout=self._layout)
        self._resumed = state_dict
        self._record = state_dict["record"]
        self._row = state_dict["row"]
        self._elapsed = state_dict["elapsed"]
        self._go_to(state_dict["round"], batches_done=state_dict["batches_done"])

    def _training(self) -> dict[str, Any]:
        """The adapter under training and its optimizer, whole, whatever keeps them."""
        optimizer = self._adapter.optimizer_state(self._optimizer)
        return {"adapter": self._adapter.read(), "optimizer": optimizer}

    def _restore(self, training: dict[str, Any] | None) -> None:
        if training is not None:
            self._adapter.write(training["adapter"].to(self._adapter.device))
            self._adapter.load_optimizer_state(self._optimizer, training["optimizer"])

    def _identity(self) -> dict[str, Any]:
        return {**self._data.identity(), **identity_of_run(vars(self))}

    def _rules_of_round(self) -> dict[str, Any]:
        num_micro = self._schedule.num_micro
        return {"trainer.accumulate_grad_batches": num_micro, **rules_of_round(vars(self))}

    # ---- files -----------------------------------------------------------------------------------

    def _save_adapters(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the new global adapter, or in mode `local` those of the round's clients."""
        assert isinstance(pl_module, LoraLM)
        if not trainer.is_global_zero:
            return
        run_dir, adapters = Path(trainer.default_root_dir), {"adapter": self.server.adapter}
        if self.mode == "local":
            visits = self._schedule.plan(self._round - 1).visits
            names = {visit.client: self._partition.names[visit.client] for visit in visits}
            adapters = own_adapters(self.server.own_adapters, names)
        views = {run_dir / name: self._adapter.named_views(x) for name, x in adapters.items()}
        save_adapters(pl_module.peft_model, self._data.tokenizer, views)
