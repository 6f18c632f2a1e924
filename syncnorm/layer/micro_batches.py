"""Micro-batches of one process that run in step: each is to a synced layer what a rank is, one that comes later.

Every micro-batch runs in a thread of its own, and only one thread runs at a time: up to the next synced layer, where
it waits until all the others have come. Nothing runs in parallel, so the work of a step is in the same order each
time. Threads are what lets the code of any model stop in the middle of a forward.
"""

from __future__ import annotations

import contextvars
import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

import torch

from syncnorm.errors import InputError, SyncNormError, known_everywhere
from syncnorm.layer.thread_state import RandomStream, ThreadState

T = TypeVar("T")
NODES_AT_ONCE = 1000
# What a waiting micro-batch has come with, and what it gets when all have come.
Meet = Callable[[list[Any]], Sequence[Any]]


class _Cancelled(BaseException):
    """Ends a micro-batch because another one has failed; an ``except Exception`` in a model does not catch it."""


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Threads that are kept: convolutions prepare themselves anew in each, which takes milliseconds."""
    return ThreadPoolExecutor(max_workers=sys.maxsize, thread_name_prefix="micro-batch")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked process has none of the threads


class _Here(threading.local):
    micro_batch: MicroBatch[Any] | None = None


_here = _Here()
# The highest number of autograd's nodes in the threads of micro-batches. They do not begin at that of the thread that
# calls: with the nodes of a whole training, catching up would take minutes.
_highest = 0


def current() -> MicroBatch[Any] | None:
    """The micro-batch that this thread runs, one of several that run in step; None outside of them."""
    return None if torch.compiler.is_compiling() else _here.micro_batch


class MicroBatch(Generic[T]):
    """One micro-batch: a function that runs in a thread, as far as the next place where all wait for each other.

    Attributes:
        index: its place among the micro-batches, from 0.
        request: what it came with to that place; None while it does not wait.
    """

    def __init__(self, index: int, function: Callable[[], T], state: ThreadState, random: RandomStream):
        self.index = index
        self.request: Any = None
        self._function, self._state, self._random = function, state, random
        self._answer: Any = None
        self._result: list[T] = []
        self._error: BaseException | None = None
        # Not locks: an interrupt may come between the two halves of a handover, whose other half then comes twice.
        self._turn, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._running = _threads().submit(contextvars.copy_context().run, self._run)

    @property
    def ended(self) -> bool:
        """Whether the function has returned or raised."""
        return bool(self._result) or self._error is not None

    @property
    def result(self) -> T:
        """What the function has returned."""
        return self._result[0]

    def resume(self, answer: Any, nodes: int) -> int:
        """Runs the function until it waits or ends; ``nodes`` of autograd exist so far.

        Returns:
            The number of nodes that exist then.

        Raises:
            BaseException: what the function raised.
        """
        self._answer, self._nodes, self.request = answer, nodes, None
        self._turn.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self._nodes

    def meet(self, request: Any) -> Any:
        """Called in the thread: waits until all micro-batches have come, and returns the answer to this one."""
        self.request = request
        self._stop()
        self._wait_for_turn()
        return self._answer

    def cancel(self) -> None:
        """Ends the function where it waits, or will wait: after an interrupt it may still run."""
        if not self.ended:
            self._error = _Cancelled()
            self._turn.release()
        self._running.result()

    def _stop(self) -> None:
        self._random.note()
        self._nodes = torch._C._autograd._get_sequence_nr()
        self._stopped.release()

    def _wait_for_turn(self) -> None:
        self._turn.acquire()
        if self._error is not None:
            # The ranks know of the error that is the reason.
            raise known_everywhere(self._error)
        self._random.restore()
        count_nodes_to(self._nodes)

    def _run(self) -> None:
        _here.micro_batch = self
        try:
            with self._state.taken_over():
                self._wait_for_turn()
                self._result.append(self._function())
        except BaseException as error:
            self._error = error
        finally:
            _here.micro_batch = None
        self._stop()


def run_in_step(
    functions: Sequence[Callable[[], T]], meet: Meet, failed: Callable[[BaseException, list[Any]], None]
) -> list[T]:
    """Runs the functions in step, each in a thread.

    Args:
        functions: one for each micro-batch.
        meet: is called in this thread with what each of the micro-batches came with to a place where all wait;
            returns an answer for each.
        failed: is called with an error before it is raised, and with what waiting micro-batches came with.

    Returns:
        What the functions return.

    Raises:
        InputError: in a micro-batch of another such call.
        SyncNormError: a micro-batch has ended where others wait.
        BaseException: what a function or ``meet`` raised; the other functions are ended.
    """
    if current() is not None:
        raise InputError(
            "micro-batches cannot be divided again: this call is made in a micro-batch that runs in step"
        )
    global _highest
    state, own_random = ThreadState(), RandomStream()
    streams = RandomStream.branched(len(functions))
    own_random.note()
    micro_batches: list[MicroBatch[T]] = []
    ending = ExitStack()  # which ends all, even if an interrupt comes in one of the calls
    ending.callback(own_random.restore)
    try:
        for index, (function, stream) in enumerate(zip(functions, streams, strict=True)):
            micro_batches.append(MicroBatch(index, function, state, stream))
            ending.callback(micro_batches[-1].cancel)
        answers: Sequence[Any] = [None] * len(functions)
        nodes = _highest
        while True:
            for micro_batch, answer in zip(micro_batches, answers, strict=True):
                nodes = _highest = micro_batch.resume(answer, nodes)
            if all(m.ended for m in micro_batches):
                return [m.result for m in micro_batches]
            count_nodes_to(nodes)
            answers = meet(_requests(micro_batches))
    except BaseException as error:
        failed(error, [m.request for m in micro_batches if m.request is not None])
        raise
    finally:
        ending.close()


def _requests(micro_batches: list[MicroBatch[Any]]) -> list[Any]:
    waiting = [m for m in micro_batches if not m.ended]
    if len(waiting) < len(micro_batches):
        ended = [m.index for m in micro_batches if m.ended]
        calls = {m.index: str(m.request) for m in waiting} | dict.fromkeys(ended, "no further synced layer")
        raise SyncNormError(different_layers(calls))
    return [m.request for m in micro_batches]


def different_layers(calls: dict[int, str]) -> str:
    """The message of the error for micro-batches that came to different places, by index."""
    lines = "\n".join(f"  micro-batch {index}: {calls[index]}" for index in sorted(calls))
    return (
        f"micro-batches that run in step called different layers:\n{lines}\n"
        f"The model must call the same synced layers in the same order for each micro-batch. If the order depends on "
        f"the data, use syncnorm.convert(model, accumulate=K) instead, where no micro-batch waits for another"
    )


def count_nodes_to(nodes: int) -> None:
    """Has autograd number the next node of this thread as if ``nodes`` existed.

    Autograd numbers the nodes of each thread, and a backward runs those first that have the highest numbers. With
    numbers in the order in which the nodes of all threads were made, it goes back through one micro-batch at a time,
    layer by layer, and reaches the layers in the same order on ranks with different numbers of micro-batches.
    """
    missing = nodes - torch._C._autograd._get_sequence_nr()
    if missing > 0 and not torch.is_inference_mode_enabled():
        with torch.enable_grad():
            scalar = torch.zeros((), device="cpu", requires_grad=True)
            larger = torch.empty(2, device="cpu")
            # One node for each copy. Not all at once: a training makes millions, and they would stay in memory.
            for done in range(0, missing, NODES_AT_ONCE):
                copies = [scalar] * min(NODES_AT_ONCE, missing - done)
                torch.broadcast_tensors(*copies, larger)  # type: ignore[no-untyped-call]  # torch leaves it untyped
