"""Notices that ranks leave for each other in the job's store, asked for with patience."""

import threading
from collections.abc import Callable
from typing import Any

_PATIENCE = 1.0  # seconds for an answer; a store that is there gives it within milliseconds


class Notices:
    """The store, by a thread: where the network is cut, torch's calls to it wait for hours, whatever their timeout.

    Args:
        store: a ``torch.distributed`` store, the same on all ranks.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._asking: threading.Thread | None = None

    def post(self, name: str, text: str = "1") -> None:
        """Leaves a notice, unless the store is out of reach."""
        self._ask(lambda: self._store.set(name, text))

    def posted(self, name: str) -> bool:
        """Whether the notice is there; False also where the store is out of reach.

        Raises:
            RuntimeError: the store has gone, with the rank that kept it.
        """
        return bool(self._ask(lambda: self._store.check([name])))

    def _ask(self, question: Callable[[], Any]) -> Any:
        if self._asking is not None and self._asking.is_alive():  # it still waits for the last answer
            return None
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(question())
            except RuntimeError as error:
                answers.append(error)

        self._asking = threading.Thread(target=ask, daemon=True)  # daemon: it may never return
        self._asking.start()
        self._asking.join(_PATIENCE)
        if answers and isinstance(answers[0], RuntimeError):
            raise answers[0]
        return answers[0] if answers else None
