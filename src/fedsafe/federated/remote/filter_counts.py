"""`filter.json` of a server: what the clients say that their filters did, in numbers."""

import json
from collections.abc import Iterable
from pathlib import Path

from fedsafe.data.output_files import write_whole
from fedsafe.federated.remote.roster import Member

FILE = "filter.json"
_OF_A_CLIENT = (
    "judged",
    "unsafe",
    "dropped",
    "refused",
    "left",
    "hits",
    "false_alarms",
    "misses",
)
_OF_ALL = ("shortened", "unjudged")


def write_filter_counts(folder: Path, members: Iterable[Member]) -> None:
    """Write the counts of the clients that have a filter, if any has.

    Each client's guard, policy and threshold are its own business and not known here.
    """
    judging = [member for member in members if set(_OF_A_CLIENT) <= member.filtered.keys()]
    if not judging:
        return
    counts = {
        "guard": "of each client",
        "policy": "of each client",
        "threshold": None,
        "total": {name: sum(member.filtered[name] for member in judging) for name in _OF_A_CLIENT},
        "held_out": dict.fromkeys(_OF_A_CLIENT, 0),
        **{name: sum(member.filtered.get(name, 0) for member in judging) for name in _OF_ALL},
        "clients": [
            {"client": member.name, **{name: member.filtered[name] for name in _OF_A_CLIENT}}
            for member in judging
        ],
    }
    write_whole(folder / FILE, [json.dumps(counts, ensure_ascii=False, indent=1) + "\n"])
