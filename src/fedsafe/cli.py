"""The `fedsafe` command: finds the subcommand and imports only what that one needs.

`import lightning` takes seconds; `fedsafe --help` must not pay for it.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from fedsafe import __version__
from fedsafe.commands.launcher import own_rank

COMMANDS = {
    "fit": ("training", "train an adapter on the clients' conversations, round by round"),
    "validate": ("training", "loss of a checkpoint on the held-out conversations"),
    "test": ("training", "loss of a checkpoint on test conversations"),
    "federate": ("federate", "fit with clients on other machines: server, client"),
    "filter": ("filter", "judge the conversations of a file with a guard, keep the safe ones"),
    "revise": ("revise", "let a model revise its answers to red-team prompts, for training"),
    "measure": ("measure", "how right guards are on labelled conversations"),
    "table": ("table", "run a grid of methods and seeds and print their table"),
    "compare": ("compare", "two runs side by side, with an interval on each difference"),
    "report": ("report", "write the page of a run or a table, report.html"),
    "world": ("world", "write the embedded miniature: data and a tiny base model"),
    "generate": ("generate", "answer a prompt with a trained adapter"),
    "export": ("export", "merge a trained adapter into its base, for any server"),
}
GO_ON = {
    "fit": "; the same command with --ckpt_path last goes on from the last finished round",
    "federate": "; a server goes on with --ckpt_path last, a client with the same command",
    "table": "; the same command goes on where it stopped",
    "filter": "; the same command goes on: verdicts are kept",
    "revise": "; the same command goes on behind the last finished batch",
    "measure": "; the same command goes on: verdicts are kept",
}
"""How to go on after Ctrl-C, where a command can."""

SHARED = ("fit", "validate", "test", "filter", "revise", "measure")
"""Commands whose work several ranks share."""

LOST = "; look above for its own words, then go on with --ckpt_path last, where a command has it"
_SIGNS_OF_LOSS = ("Connection closed by peer", "Connection reset by peer", "Timed out", "NCCL")

INTERRUPTED = 130
"""The exit status that shells give a command ended by Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit status: 0 where all went well, 1 where the command failed, 2 where the arguments
        were wrong, 130 where the user interrupted it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if arguments[0] == "--version":
        sys.stdout.write(f"fedsafe {__version__}\n")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        sys.stderr.write(f"fedsafe has no command {name!r}; it has {', '.join(COMMANDS)}\n")
        return 2
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    try:
        import_module("fedsafe.commands.launcher").name_slurm_tasks()
        if name not in SHARED and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"it runs in one process; start it without torchrun or srun, by which "
                f"{', '.join(SHARED)} can share their work"
            )
        import_module(f"fedsafe.commands.{COMMANDS[name][0]}").run(name, arguments)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nfedsafe {name} was interrupted{GO_ON.get(name, '')}\n")
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if os.environ.get("FEDSAFE_DEBUG"):
            raise
        sys.stderr.write(f"fedsafe {name}{_rank()}: {error}\n")
        return 1
    except RuntimeError as error:
        if os.environ.get("FEDSAFE_DEBUG") or not _is_loss_of_a_rank(error):
            raise
        line = str(error).strip().splitlines()[0]
        sys.stderr.write(f"fedsafe {name}{_rank()}: another rank is gone ({line}){LOST}\n")
        return 1
    _leave_the_other_ranks()  # not after an error: the others would have to leave too
    return 0


def _rank() -> str:
    """Says which of several processes failed, but for the first."""
    return f" (rank {own_rank()})" if own_rank() else ""


def _is_loss_of_a_rank(error: RuntimeError) -> bool:
    """Whether torch says that a process of this run does not answer any more."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and any(sign in str(error) for sign in _SIGNS_OF_LOSS)


def _leave_the_other_ranks() -> None:
    """End what ties the processes of a run together, where there are several."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _help() -> str:
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return (
        "usage: fedsafe COMMAND [options]\n\n"
        "Federated fine-tuning of large language models that stays safe.\n\n"
        "commands:\n" + "\n".join(lines) + "\n\n"
        "fedsafe COMMAND --help explains the options of a command.\n"
        "FEDSAFE_DEBUG=1 in the environment shows where an error came from.\n"
    )
