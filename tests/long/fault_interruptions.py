"""Faults in which a rank, or another process of the job, is interrupted, ends or cannot continue."""

import builtins
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fault_jobs import LAYERS, STEPS, Fault, Job, LeftOut, Trainer, write_note
from fault_kinds import ErrorReport, FaultKind
from torch import Tensor, nn

from syncnorm.comm import exchange, failure_flags
from syncnorm.layer.kernels import cpu


class Kill(FaultKind):
    description = "SIGKILL at a random moment, or while the others wait in a layer"
    variants = ("timer", "timer", "asleep")
    outcomes = frozenset({"layer error", "DDP error", "equal"})
    dies = True

    def waits_for_timeout(self, fault: Fault) -> bool:
        return fault.step == 0  # it may hit the rank while it connects: see Connect

    def step(self, job: Job, trainers: list[Trainer], x: Tensor, classes: Tensor) -> None:
        if job.fault.variant == "timer":
            threading.Thread(target=self.killed, args=(job, 0.06 * job.fault.delay), daemon=True).start()
        super().step(job, trainers, x, classes)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        if job.fault.variant == "asleep":
            self.killed(job, 2.5 * job.fault.delay)
        return norm(x)

    def killed(self, job: Job, seconds: float) -> None:
        time.sleep(seconds)
        job.mark_fault()
        os.kill(os.getpid(), signal.SIGKILL)


class Interrupt(FaultKind):
    description = "SIGINT on a rank that waits in a layer; its training loop catches it and continues"
    variants = ("forward", "backward")
    steps = range(STEPS - 1)  # after the last step nothing would continue

    def is_clear(self, fault: Fault, rank: int, errors: dict[int, ErrorReport]) -> bool:
        return super().is_clear(fault, rank, errors) and f"rank {fault.rank}" in errors[rank].text

    def continues_after(self, fault: Fault, error: BaseException) -> bool:
        return isinstance(error, KeyboardInterrupt)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        timer = threading.Thread(target=self.interrupted, args=(job,), daemon=True)
        return before(job.fault.variant, timer.start, norm, x)

    def others_in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        return before(job.fault.variant, lambda: time.sleep(1.5), norm, x)

    def interrupted(self, job: Job) -> None:
        time.sleep(0.05 + job.fault.delay)
        job.mark_fault()
        os.kill(os.getpid(), signal.SIGINT)


# The kernel that fails: before the exchange of the forward, before that of the backward, and during the latter.
PASSES = {"forward": "local_moments", "backward": "reduce_grad", "under way": "begin_grad"}


class Memory(FaultKind):
    description = "memory runs out on one rank; its training loop skips the batch"
    variants = tuple(f"{when}, {error.__name__}" for when in PASSES for error in (RuntimeError, MemoryError))
    steps = range(STEPS - 1)

    def is_clear(self, fault: Fault, rank: int, errors: dict[int, ErrorReport]) -> bool:
        return super().is_clear(fault, rank, errors) and f"rank {fault.rank}" in errors[rank].text

    def expected(self, fault: Fault, rank: int) -> frozenset[str]:
        if "under way" in fault.variant:
            return self.outcomes
        # After an incomplete backward DDP raises in the next forward, on all ranks.
        return frozenset({"DDP error"} if fault.ddp and "backward" in fault.variant else {"equal"})

    def continues_after(self, fault: Fault, error: BaseException) -> bool:
        return "not enough memory" in str(error)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        when, error = job.fault.variant.split(", ")
        name = PASSES[when]
        real = getattr(cpu, name)

        def full(*args: Any) -> None:
            setattr(cpu, name, real)
            job.mark_fault()
            raise getattr(builtins, error)("DefaultCPUAllocator: not enough memory: you tried to allocate")

        direction = "forward" if when == "forward" else "backward"
        return before(direction, lambda: setattr(cpu, name, full), norm, x)

    def in_reference(self, fault: Fault, norm: nn.Module, x: Tensor) -> Tensor:
        return before(fault.variant.split(", ")[0], leave_out, norm, x)


def leave_out() -> None:
    raise LeftOut


def before(direction: str, act: Callable[[], object], norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``, with a call of ``act`` before its forward or its backward."""
    if direction == "forward":
        act()
    y = norm(x)
    if direction == "backward":
        y.register_hook(lambda _: act() and None)  # the result of a hook would replace the gradient
    return y


class Connect(FaultKind):
    description = "a rank is killed, is stopped or raises before, or during, the connecting in the first layer"
    variants = (
        *(f"{where}, {how}" for where in ("before", "announced", "midway") for how in ("SIGKILL", "SIGSTOP")),
        "announced, raises",
        "midway, raises",
    )
    steps, layers = range(1), LAYERS[:1]
    dies = True

    def waits_for_timeout(self, fault: Fault) -> bool:
        return "raises" not in fault.variant

    def expected(self, fault: Fault, rank: int) -> frozenset[str]:
        return frozenset({"layer error"})

    def is_clear(self, fault: Fault, rank: int, errors: dict[int, ErrorReport]) -> bool:
        if rank == fault.rank:
            return errors[rank].text == "raised by the fault"
        texts = (
            f"waiting for ranks [{fault.rank}]",
            f"waiting for rank {fault.rank}, which",
            "look for the first error",
        )
        return super().is_clear(fault, rank, errors) and any(text in errors[rank].text for text in texts)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        where, how = job.fault.variant.split(", ")
        post, connect = failure_flags.FailureFlags.post, exchange._connect

        def end() -> None:
            job.mark_fault()
            if how == "raises":
                raise ValueError("raised by the fault")
            write_note(job.notes / f"lost{job.rank}", how)
            os.kill(os.getpid(), getattr(signal, how))

        def announce(*args: Any) -> None:
            post(*args)
            end()

        class Ends(dist.Store):
            def __init__(self, real: dist.Store) -> None:
                super().__init__()
                self.real = real

            def set(self, *args: Any) -> None:
                self.real.set(*args)  # the address of this rank
                end()

        if where == "before":
            end()
        elif where == "announced":
            failure_flags.FailureFlags.post = announce
        else:
            exchange._connect = lambda store, *args: connect(Ends(store), *args)
        return norm(x)


class Rectified(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Picky(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.size(3) < 2:
            raise ValueError(f"too narrow: {tuple(x.shape)}")
        return super().forward(x)


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x * 1


NORMS: dict[str, type[nn.Module]] = {"BatchNorm2d": nn.BatchNorm2d, "Rectified": Rectified, "Picky": Picky}
# Inputs that a layer rejects, computed from a valid one, and a word of the error message.
ODD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "dims": (lambda x: x[0, 0], "2D"),
    "channels": (lambda x: torch.cat([x, x[:, :1]], 1), "channels"),
    "list": (lambda x: x.tolist(), "list"),
    "sparse": (lambda x: x.to_sparse(), "sparse"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "float8"),
    "int": (lambda x: x.long(), "int64"),
    "inference": (inference, "inference_mode"),
    "narrow": (lambda x: x[..., :1], "too narrow"),
}


class Refused(FaultKind):
    description = "a layer rejects the batch of one rank: an error on all ranks; some jobs catch it and continue"
    variants = tuple(
        f"{odd}, {norm}{end}"
        for odd in ODD
        for norm in (("Picky", "Picky") if odd == "narrow" else ("BatchNorm2d", "Rectified"))
        for end in ("", ", caught")
    )

    def expected(self, fault: Fault, rank: int) -> frozenset[str]:
        return frozenset({"equal" if "caught" in fault.variant else "layer error"})

    def is_clear(self, fault: Fault, rank: int, errors: dict[int, ErrorReport]) -> bool:
        if fault.rank not in errors:
            return False
        reason = errors[fault.rank].text
        word = ODD[fault.variant.split(", ")[0]][1]
        known = rank == fault.rank or errors[rank].is_syncnorm_error
        return known and word in reason and reason[:200] in errors[rank].text

    def norm(self, fault: Fault) -> type[nn.Module]:
        return NORMS[fault.variant.split(", ")[1]]

    def continues_after(self, fault: Fault, error: BaseException) -> bool:
        return "caught" in fault.variant and isinstance(error, Exception)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        made_odd = ODD[job.fault.variant.split(", ")[0]][0]
        job.mark_fault()
        return norm(made_odd(x))

    def in_reference(self, fault: Fault, norm: nn.Module, x: Tensor) -> Tensor:
        raise LeftOut


class Store(FaultKind):
    description = (
        "the process that hosts the job's store, not a rank of the group, ends; one rank comes late to a layer"
    )
    steps = range(1, STEPS)  # connecting needs the store
    outcomes = frozenset({"equal"})
    helpers = 1

    def store(self, job: Job) -> dist.Store:
        keeper = job.rank == len(job.fault.rows)
        port = job.notes / "port of the helper"
        if not keeper:
            appears(port)
        store = dist.TCPStore(
            "localhost", 0 if keeper else int(port.read_text()), is_master=keeper, wait_for_workers=False
        )
        if keeper:
            write_note(port, str(store.port))
        return store

    def help(self, job: Job) -> None:
        appears(job.notes / "midway")

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        write_note(job.notes / "midway", "")
        appears(job.notes / f"status{len(job.fault.rows)}")
        job.mark_fault()
        time.sleep(2.5 * job.fault.delay)
        return norm(x)


def appears(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


class Fork(FaultKind):
    description = (
        "a forked child of a rank runs a training forward: an immediate error in the child, and no effect elsewhere"
    )
    variants = ("model", "layer")
    outcomes = frozenset({"equal"})

    def step(self, job: Job, trainers: list[Trainer], x: Tensor, classes: Tensor) -> None:
        model = trainers[0].model
        job.mark_fault()
        message = in_child(lambda: (model if job.fault.variant == "model" else getattr(model, job.fault.layer))(x))
        if "was forked from a rank" not in message:
            raise AssertionError(f"the child: {message}")
        super().step(job, trainers, x, classes)


def in_child(call: Callable[[], object], seconds: float = 5) -> str:
    """The error of ``call`` in a forked child, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            call()
            text = "no error"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    answers = select.select([reading], [], [], seconds)[0]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    text = os.read(reading, 10_000).decode() if answers else f"no answer within {seconds} s"
    os.close(reading)
    return text
