"""What two runs of the same settings share of their records."""

from typing import Any


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    """A record without the times it took, also in its parts."""
    return {name: _bare(value) for name, value in row.items() if not name.startswith("seconds")}


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return without_seconds(value)
    return [_bare(item) for item in value] if isinstance(value, list) else value
