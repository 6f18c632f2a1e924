"""What a rank does while it waits for others: looks whether one has failed, warns, says in the end who is missing."""

import time
import warnings

from syncnorm.comm.call import Call, Kind
from syncnorm.comm.failure_flags import Notices

_NOTE_AFTER, _WARN_AFTER = 1.0, 10.0  # seconds, until the other ranks can read that this one waits, and the user does
_ROLL_CALL = 0.6  # seconds that a failed rank waits for the others to say that they failed as well


class Waiting:
    """The waiting of one rank for the others of its group.

    Args:
        notices: of the group.
    """

    def __init__(self, notices: Notices) -> None:
        self._notices = notices
        self._posted = ""
        self._warned: set[tuple[Kind, str]] = set()

    def look_around(self, call: Call, number: int, seconds: float) -> None:
        """To be called now and then by a rank that has waited for ``seconds`` in exchange ``number``.

        Raises:
            RuntimeError: another rank's exchanges are over.

        Warns:
            UserWarning: after ten seconds, once a layer, with the ranks that are missing.
        """
        if self._notices.any_failure():
            raise RuntimeError("another rank's exchange failed")
        mark = f"{number} {call}"
        if seconds > _NOTE_AFTER and self._posted != mark:
            self._notices.post("waiting", mark)
            self._posted = mark
        if seconds > _WARN_AFTER and (call.kind, call.layer) not in self._warned:
            self._warned.add((call.kind, call.layer))
            waiting = self._notices.by_rank("waiting")
            here = None if waiting is None else [r for r, text in waiting.items() if text.split()[0] == str(number)]
            missing = None if here is None else [rank for rank in self._others() if rank not in here]
            warnings.warn(
                f"rank {self._notices.rank} has waited {seconds:.0f} s for {_names(missing)} in {call}. If only some "
                f"ranks make this forward, for example to evaluate: was `model.eval()` forgotten? In training mode "
                f"it belongs under `with syncnorm.no_sync_stats():`. If not, the others are slow, or wait "
                f"elsewhere, for example in a collective of DDP",
                stacklevel=2,
            )

    def why(self, call: Call, error: BaseException, reason: str = "") -> str:
        """The message of an error for a rank that waits no longer. Tells the others, and hears of theirs.

        Args:
            call: what it waited in.
            error: what ended the waiting.
            reason: what the others have to know beside that.
        """
        self._notices.post_failure(reason)
        failures = self._notices.by_rank("failed")
        deadline = time.monotonic() + _ROLL_CALL
        while failures is not None and len(failures) < len(self._notices.ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
            failures = self._notices.by_rank("failed")
        reasons = {rank: text for rank, text in (failures or {}).items() if text}
        if reasons:
            waited = " and ".join(f"rank {rank}, which {text}" for rank, text in reasons.items())
        else:
            absent = None if failures is None else [r for r in self._others() if r not in failures]
            waited = "a rank that failed as well" if absent == [] else _names(absent)
            waited += (
                ". It died, raised an error of its own (look for the first one), does not run this layer, or waits "
                "in a collective of DDP"
            )
        what = f"rank {self._notices.rank}: {call} over ranks {self._notices.ranks} failed"
        return f"{what}, waiting for {waited}. The backend said: {error}"

    def _others(self) -> list[int]:
        return [rank for rank in self._notices.ranks if rank != self._notices.rank]


def _names(ranks: list[int] | None) -> str:
    """Of the ranks that are missing; an empty list, or None, where that is not known."""
    return f"ranks {ranks}" if ranks else "other ranks (the job's store does not say which)"
