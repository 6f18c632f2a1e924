"""Faults of a rank, or of another process of the job, that is interrupted, ends or cannot go on."""

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
from fault_jobs import LAYERS, STEPS, Fault, Job, LeftOut, Trainer, note
from fault_kinds import Kind, Told
from torch import Tensor, nn

from syncnorm.comm import exchange, failure_flags
from syncnorm.layer.kernels import cpu


class Kill(Kind):
    what = "SIGKILL at a random moment, or while the others wait in a layer"
    hows = ("timer", "timer", "asleep")
    outcomes = frozenset({"layer error", "DDP error", "equal"})
    lost = True

    def step(self, job: Job, trainers: list[Trainer], x: Tensor, classes: Tensor) -> None:
        if job.fault.how == "timer":
            threading.Thread(target=self.killed, args=(job, 0.06 * job.fault.delay), daemon=True).start()
        super().step(job, trainers, x, classes)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        if job.fault.how == "asleep":
            self.killed(job, 2.5 * job.fault.delay)
        return norm(x)

    def killed(self, job: Job, seconds: float) -> None:
        time.sleep(seconds)
        job.happens()
        os.kill(os.getpid(), signal.SIGKILL)


class Interrupt(Kind):
    what = "SIGINT on a rank that waits in a layer; its training loop catches that and goes on"
    hows = ("forward", "backward")
    steps = range(STEPS - 1)  # after the last one nothing would go on

    def clear(self, fault: Fault, rank: int, told: dict[int, Told]) -> bool:
        return super().clear(fault, rank, told) and f"rank {fault.rank}" in told[rank].text

    def goes_on(self, fault: Fault, error: BaseException) -> bool:
        return isinstance(error, KeyboardInterrupt)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        timer = threading.Thread(target=self.interrupted, args=(job,), daemon=True)
        return before(job.fault.how, timer.start, norm, x)

    def others_in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        return before(job.fault.how, lambda: time.sleep(1.5), norm, x)

    def interrupted(self, job: Job) -> None:
        time.sleep(0.05 + job.fault.delay)
        job.happens()
        os.kill(os.getpid(), signal.SIGINT)


# What fails: before the exchange of the forward, before that of the backward, and while the latter is under way.
PASSES = {"forward": "local_moments", "backward": "reduce_grad", "under way": "begin_grad"}


class Memory(Kind):
    what = "memory runs out on one rank; its training loop skips such a batch"
    hows = tuple(f"{when}, {error.__name__}" for when in PASSES for error in (RuntimeError, MemoryError))
    steps = range(STEPS - 1)

    def clear(self, fault: Fault, rank: int, told: dict[int, Told]) -> bool:
        return super().clear(fault, rank, told) and f"rank {fault.rank}" in told[rank].text

    def right(self, fault: Fault, rank: int) -> frozenset[str]:
        if "under way" in fault.how:
            return self.outcomes
        # DDP refuses the forward after a backward that ended early, on all ranks.
        return frozenset({"DDP error"} if fault.ddp and "backward" in fault.how else {"equal"})

    def goes_on(self, fault: Fault, error: BaseException) -> bool:
        return "not enough memory" in str(error)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        when, error = job.fault.how.split(", ")
        name = PASSES[when]
        real = getattr(cpu, name)

        def full(*args: Any) -> None:
            setattr(cpu, name, real)
            job.happens()
            raise getattr(builtins, error)("DefaultCPUAllocator: not enough memory: you tried to allocate")

        direction = "forward" if when == "forward" else "backward"
        return before(direction, lambda: setattr(cpu, name, full), norm, x)

    def alone(self, fault: Fault, norm: nn.Module, x: Tensor) -> Tensor:
        return before(fault.how.split(", ")[0], leave_out, norm, x)


def leave_out() -> None:
    raise LeftOut


def before(direction: str, act: Callable[[], object], norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``, before whose forward or backward ``act`` is called."""
    if direction == "forward":
        act()
    y = norm(x)
    if direction == "backward":
        y.register_hook(lambda _: act() and None)  # a hook that returns something changes the gradient
    return y


class Connect(Kind):
    what = "a rank dies, is stopped or fails before, or midway through, the connecting of the first layer"
    hows = (
        *(f"{where}, {how}" for where in ("before", "announced", "midway") for how in ("SIGKILL", "SIGSTOP")),
        "announced, raises",
        "midway, raises",
    )
    steps, layers = range(1), LAYERS[:1]
    lost = True

    def waits(self, fault: Fault) -> bool:
        return "raises" not in fault.how

    def right(self, fault: Fault, rank: int) -> frozenset[str]:
        return frozenset({"layer error"})

    def clear(self, fault: Fault, rank: int, told: dict[int, Told]) -> bool:
        if rank == fault.rank:
            return told[rank].text == "of its own"
        says = (f"waiting for ranks [{fault.rank}]", f"waiting for rank {fault.rank}, which", "of its own")
        return super().clear(fault, rank, told) and any(text in told[rank].text for text in says)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        where, how = job.fault.how.split(", ")
        post, connect = failure_flags.FailureFlags.post, exchange._connect

        def end() -> None:
            job.happens()
            if how == "raises":
                raise ValueError("of its own")
            note(job.notes / f"lost{job.rank}", how)
            os.kill(os.getpid(), getattr(signal, how))

        def announce(*args: Any) -> None:
            post(*args)
            end()

        class Ends(dist.Store):
            def __init__(self, real: dist.Store) -> None:
                super().__init__()
                self.real = real

            def set(self, *args: Any) -> None:
                self.real.set(*args)  # its address
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
# What a layer refuses, made of what it takes, and a word of the reason.
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


class Refused(Kind):
    what = "a layer refuses the batch of one rank: an error of all ranks, with its reason; some catch that and go on"
    hows = tuple(
        f"{odd}, {norm}{end}"
        for odd in ODD
        for norm in (("Picky", "Picky") if odd == "narrow" else ("BatchNorm2d", "Rectified"))
        for end in ("", ", caught")
    )

    def right(self, fault: Fault, rank: int) -> frozenset[str]:
        return frozenset({"equal" if "caught" in fault.how else "layer error"})

    def clear(self, fault: Fault, rank: int, told: dict[int, Told]) -> bool:
        if fault.rank not in told:
            return False
        reason = told[fault.rank].text
        word = ODD[fault.how.split(", ")[0]][1]
        return word in reason and reason[:200] in told[rank].text and (rank == fault.rank or told[rank].ours)

    def norm(self, fault: Fault) -> type[nn.Module]:
        return NORMS[fault.how.split(", ")[1]]

    def goes_on(self, fault: Fault, error: BaseException) -> bool:
        return "caught" in fault.how and isinstance(error, Exception)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        made_odd = ODD[job.fault.how.split(", ")[0]][0]
        job.happens()
        return norm(made_odd(x))

    def alone(self, fault: Fault, norm: nn.Module, x: Tensor) -> Tensor:
        raise LeftOut


class Store(Kind):
    what = "the process that keeps the job's store, no rank of the group, ends; one rank comes late to a layer"
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
            note(port, str(store.port))
        return store

    def help(self, job: Job) -> None:
        appears(job.notes / "midway")

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        note(job.notes / "midway", "")
        appears(job.notes / f"status{len(job.fault.rows)}")
        job.happens()
        time.sleep(2.5 * job.fault.delay)
        return norm(x)


def appears(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


class Fork(Kind):
    what = "a forked child of a rank makes a training forward: an error there and at once, and nothing else"
    hows = ("model", "layer")
    outcomes = frozenset({"equal"})

    def step(self, job: Job, trainers: list[Trainer], x: Tensor, classes: Tensor) -> None:
        model = trainers[0].model
        job.happens()
        told = in_child(lambda: (model if job.fault.how == "model" else getattr(model, job.fault.layer))(x))
        if "was forked from a rank" not in told:
            raise AssertionError(f"the child: {told}")
        super().step(job, trainers, x, classes)


def in_child(call: Callable[[], object], seconds: float = 5) -> str:
    """What a forked child says of ``call``."""
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
