"""Notices that the ranks of a group leave for each other in the job's store, asked for with patience."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from syncnorm.comm import threads

_PATIENCE = 1.0  # seconds for an answer; a store that is there gives it within milliseconds

T = TypeVar("T")


class Notices:
    """The store, asked by a thread: with the network cut, torch's calls to it wait for hours, whatever their timeout.

    A store that does not answer, or has ended with the rank that kept it, is no failure of the group: its ranks are
    connected to each other. What it would have said is then unknown, which is not the same as "no".

    Args:
        store: a ``torch.distributed`` store, the same on all ranks.
        rank: this one.
        ranks: of the group.
    """

    def __init__(self, store: Any, rank: int, ranks: Sequence[int]) -> None:
        self.store = store
        self.rank = rank
        self.ranks = ranks
        self._asking: threading.Thread | None = None
        self._turn = threading.Lock()  # of the threads that ask: what one has to tell is not dropped for another
        self._gone = False

    def post(self, name: str, text: str) -> None:
        """Leaves this rank's notice, unless the store is out of reach."""
        self._ask(lambda: self.store.set(f"{name}/{self.rank}", text))

    def by_rank(self, name: str) -> dict[int, str] | None:
        """The notices of that name; without the ranks that left none. None where that is unknown."""

        def read() -> dict[int, str]:
            posted = [rank for rank in self.ranks if self.store.check([f"{name}/{rank}"])]
            return {rank: self.store.get(f"{name}/{rank}").decode() for rank in posted}

        return self._ask(read)

    def post_failure(self, reason: str) -> None:
        """Tells the ranks that wait for this one that its exchanges are over; ``reason`` may be empty."""

        def write() -> None:
            self.store.set(f"failed/{self.rank}", reason)
            self.store.set("failed", "1")

        self._ask(write)

    def any_failure(self) -> bool:
        """Whether the exchanges of a rank are over; False also where that is unknown."""
        return bool(self._ask(lambda: self.store.check(["failed"])))

    def _ask(self, question: Callable[[], T]) -> T | None:
        answers: list[T] = []

        def ask() -> None:
            try:
                answers.append(question())
            except RuntimeError:  # torch.distributed's own errors are RuntimeErrors
                self._gone = True

        with self._turn:
            if self._gone or (self._asking is not None and self._asking.is_alive()):  # it waits for the last answer
                return None
            self._asking = threads.start(ask)
            self._asking.join(_PATIENCE)
        return answers[0] if answers else None
