"""`SafetyFilter`: what a client does with samples that a guard calls unsafe.

Knows nothing of who calls: a simulated federation, one client of a real one, or a command that
reads a file.
"""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, final

from fedsafe.peers import ALONE, Peers
from fedsafe.safety.guard import Guard, shown
from fedsafe.safety.score_cache import ScoreCache, conversation_key
from fedsafe.types import Conversation, JudgedPart, Turn, Verdict

Policy = Literal["drop", "refuse", "keep"]

_DIGITS = 6
_DEFAULT_REFUSALS = Path(__file__).with_name("refusals.txt")


@final
class SafetyFilter:
    """A guard judges each client's samples; the unsafe ones are dropped, repaired or noted.

    Verdicts are kept in `$FEDSAFE_CACHE` (default `~/.cache/fedsafe`), so that another threshold or
    policy costs nothing and a killed scan goes on.

    Args:
        guard: Who judges.
        policy: What becomes of an unsafe sample: `drop` leaves it out, `refuse` puts a refusal in
            place of its response, `keep` only writes the verdict down.
        judge: What the guard is shown of a sample: the `pair` of prompt and response, the `prompt`
            alone, or the `response` alone. Turns of the system are not shown.
        threshold: Probability from which a sample is unsafe, 0 to 1.
        refusals: Text file of refusals, one a line, for policy `refuse`; None takes those shipped.
        max_unsafe_share: Share of unsafe samples above which the run stops, 0 to 1: a guard that
            flags nearly everything is set up wrongly. Policy `keep` never stops.
        record_text: Whether `filter.jsonl` of the run directory holds the conversations too.
    """

    def __init__(
        self,
        guard: Guard,
        policy: Policy = "drop",
        judge: JudgedPart = "pair",
        threshold: float = 0.5,
        refusals: str | None = None,
        max_unsafe_share: float = 0.7,
        record_text: bool = False,
    ) -> None:
        for name, value in (("threshold", threshold), ("max_unsafe_share", max_unsafe_share)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} of the filter is {value}; give a number from 0 to 1")
        if refusals is not None and policy != "refuse":
            raise ValueError(
                f"refusals is {refusals!r}, but policy {policy!r} uses none; leave it out, or set "
                "policy: refuse"
            )
        self.guard = guard
        self.policy = policy
        self.judge = judge
        self.threshold = threshold
        self.max_unsafe_share = max_unsafe_share
        self.record_text = record_text
        self._refusals = _read_refusals(Path(refusals) if refusals else _DEFAULT_REFUSALS)
        self._cache = ScoreCache(guard)

    @property
    def identity(self) -> str:
        """The settings that decide what becomes of a sample, in a line."""
        guard = blake2b(self.guard.identity.encode(), digest_size=6).hexdigest()
        return (
            f"{self.policy}, {self.judge}, threshold {self.threshold:g}, {self.guard.name} {guard}"
        )

    def verdicts(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """The guard's verdict on each sample, in order; kept ones are not judged again."""
        return self._cache.verdicts([shown(each, self.judge) for each in conversations])

    def judge_windows(
        self, windows: Sequence[Sequence[Conversation]], *, peers: Peers = ALONE
    ) -> list[tuple[dict[int, Verdict], dict[int, str]]]:
        """Of each window the verdicts by index, and by index why the guard cannot judge the others.

        Args:
            windows: Samples that are judged together, the same on all ranks.
            peers: Ranks that share the windows.
        """
        asked = [[shown(each, self.judge) for each in window] for window in windows]
        return self._cache.judge_windows(asked, peers=peers)

    def is_unsafe(self, verdict: Verdict) -> bool:
        """Whether a verdict reaches the threshold."""
        return verdict.unsafe >= self.threshold

    def refused(self, messages: Conversation, *, seed: int) -> Conversation:
        """The sample with a refusal as its response; which one depends on both arguments alone."""
        digest = blake2b(conversation_key(messages) + seed.to_bytes(8), digest_size=8).digest()
        refusal = self._refusals[int.from_bytes(digest) % len(self._refusals)]
        return [*messages[:-1], Turn(role="assistant", content=refusal)]

    def check_share(self, num_unsafe: int, *, num_judged: int) -> None:
        """Stop where so much is unsafe that the guard is more likely wrong than the data.

        Raises:
            ValueError: If the share is above `max_unsafe_share`, unless the policy is `keep`.
        """
        if self.policy == "keep" or num_unsafe <= self.max_unsafe_share * num_judged:
            return
        raise ValueError(
            f"the guard {self.guard.name} calls {num_unsafe:,} of {num_judged:,} samples unsafe "
            f"({num_unsafe / num_judged:.0%}), more than max_unsafe_share {self.max_unsafe_share:g}"
            "; likely the checkpoint does not belong to the guard's format or has another chat "
            f"template, the threshold {self.threshold:g} is too low for it, or it does not know "
            "the language. Look at its verdicts with policy: keep, or raise max_unsafe_share"
        )


def verdict_columns(verdict: Verdict) -> dict[str, Any]:
    """A verdict as `filter.jsonl` holds it."""
    columns: dict[str, Any] = {
        "unsafe": round(verdict.unsafe, _DIGITS),
        "categories": list(verdict.categories),
        "guard": verdict.guard,
    }
    return {**columns, "shortened": True} if verdict.shortened else columns


def _read_refusals(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"there is no file of refusals {file}; give one, or leave refusals out")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"the refusals in {file} are not UTF-8 ({error}); convert them") from error
    refusals = [line.strip() for line in lines if line.strip()]
    if not refusals:
        raise ValueError(f"the file of refusals {file} is empty; write one refusal a line")
    return refusals
