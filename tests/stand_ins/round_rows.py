"""What two runs of the same settings share of their records."""

from typing import Any


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    """A record without the times it took, also in its parts."""
    return {
        name: without_seconds(value) if isinstance(value, dict) else value
        for name, value in row.items()
        if not name.startswith("seconds")
    }
