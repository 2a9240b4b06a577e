"""Small federations under FSDP2: the cases of `tests/federated/ddp_cases.py`.

    python -m torch.distributed.run --nproc_per_node=2 sharded_runs.py FOLDER BASE CONVERSATIONS

Two ranks run them under DDP, under FSDP2, and with a group a rank; four ranks, as two groups of
two; one rank under FSDP2 and as one process, on the accelerator that a last argument names. Each
leaves `FOLDER/<way>/<case>/`.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from federations import Federation
from lightning.pytorch.strategies import DDPStrategy

from fedsafe.strategies.sharded import ShardedStrategy

sys.path.append(str(Path(__file__).parents[1] / "federated"))
import ddp_cases  # found once its folder is known
from ddp_cases import RESUMED, federation_of, finish, resume, start_and_stop

CASES: dict[str, Callable[[], Any]] = {
    **ddp_cases.CASES,
    "mixed": lambda: {
        "model": {"dtype": "bfloat16", "lora_dropout": 0.2},
        "trainer": {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
    },
}
ONE_GROUP = ("fedavg", "scaffold", "fedprox", "accumulated", "clipped", "checkpointed", "mixed")
"""Cases of one client at a time; `RESUMED` is another one."""
ALONE = ("scaffold", "checkpointed", "mixed")
"""Cases for one rank."""
GROUPS = ("fedavg", "scaffold")
"""Cases of two clients at a time."""
EXCHANGES = ("updates", "sums")
NUM_RANKS = int(os.environ.get("WORLD_SIZE", "1"))

Strategy = Callable[[], Any]


def groups(exchange: str) -> Strategy:
    """Two groups, of as many ranks as there are for each."""
    return partial(ShardedStrategy, clients=2, exchange=exchange)


def run(
    folder: Path,
    case: str,
    base: Path,
    path: Path,
    strategy: Strategy | None,
    *,
    accelerator: str = "cpu",
) -> None:
    """Run a case; None is one process."""
    if case == RESUMED:
        start_and_stop(folder / case, base=base, path=path, strategy=strategy)
        resume(folder / case, base=base, path=path, strategy=strategy)
        return
    settings: Any = CASES[case]()
    machine = {"devices": NUM_RANKS, "accelerator": accelerator}
    settings["trainer"] = {**machine, **settings.get("trainer", {})}
    done = federation_of(folder / case, settings, base, path, strategy).fit()
    finish(done)
    if case == "fedavg" and strategy is not None:
        use_again(done, base, path, strategy)


def use_again(done: Federation, base: Path, path: Path, strategy: Strategy) -> None:
    """Measure the trained model, and train it once more, each in a new Trainer."""
    settings: Any = {"data": {"validation_share": 0.3}, "trainer": {"devices": NUM_RANKS}}
    make = partial(federation_of, settings=settings, base=base, path=path, strategy=strategy)
    measuring = make(done.folder / "measured")
    [measured] = measuring.trainer.validate(done.module, datamodule=measuring.data, verbose=False)
    if done.trainer.is_global_zero:
        (done.folder / "measured.json").write_text(json.dumps(measured))
    finish(replace(make(done.folder / "more"), module=done.module).fit())


def main(folder: Path, base: Path, path: Path, accelerator: str = "cpu") -> None:
    if NUM_RANKS == 1:
        for case in ALONE:
            for way, strategy in (("alone", ShardedStrategy), ("plain", None)):
                run(folder / way, case, base, path, strategy, accelerator=accelerator)
    elif NUM_RANKS == 4:
        run(folder / "four", "fedavg", base, path, groups("updates"))
    else:
        for case in (*ONE_GROUP, RESUMED):
            run(folder / "ddp", case, base, path, DDPStrategy)
            run(folder / "fsdp", case, base, path, ShardedStrategy)
        for case in GROUPS:
            for exchange in EXCHANGES:
                run(folder / exchange, case, base, path, groups(exchange))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *sys.argv[4:])
