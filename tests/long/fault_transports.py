"""Faults inside the transports: while a rank writes a frame, waits in shared memory, or looks for its host."""

import os
import signal
import subprocess
import threading
import time
from typing import Any

from fault_jobs import LAYERS, STEPS, Fault, Job, Net
from fault_kinds import ErrorReport, FaultKind
from torch import Tensor, nn

from syncnorm import comm
from syncnorm.comm.transports import discovery, shared_memory

PAUSE_S = 2.0  # how long a stopped rank rests
MESSAGE = "raised by the fault"


def end(job: Job, how: str) -> None:
    """Kills, interrupts or stops this rank for a while, or raises an error."""
    job.mark_fault()
    if how == "MemoryError":
        raise MemoryError(MESSAGE)
    if how == "SIGSTOP":
        subprocess.Popen(["sh", "-c", f"sleep {PAUSE_S}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), getattr(signal, how))


class Ending(FaultKind):
    """What the kinds below have in common: the end of a variant's text says how the rank ends."""

    dies = True

    def expected(self, fault: Fault, rank: int) -> frozenset[str]:
        return frozenset({"equal"}) if fault.variant.endswith("SIGSTOP") else self.outcomes

    def is_clear(self, fault: Fault, rank: int, errors: dict[int, ErrorReport]) -> bool:
        if rank == fault.rank:
            return errors[rank].text in (MESSAGE, "")  # a KeyboardInterrupt has no text
        return super().is_clear(fault, rank, errors)


class Frame(Ending):
    description = "a rank ends or rests between writing and counting a frame, or while it waits in shared memory"
    variants = (
        *(f"written, {how}" for how in ("SIGKILL", "SIGSTOP", "MemoryError", "SIGINT")),
        *(f"waiting, {how}" for how in ("SIGKILL", "SIGSTOP", "SIGINT")),
    )
    steps = range(1, STEPS)  # of the first one the others would still have to connect

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        *_, moment, how = job.fault.variant.split(", ")
        publish = shared_memory.Rows.publish
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def ends(*args: Any) -> None:
            shared_memory.Rows.publish = publish
            end(job, how)
            publish(*args)

        def ends_later() -> None:
            time.sleep(0.2 + job.fault.delay)
            end(job, how)

        if moment == "written":
            shared_memory.Rows.publish = ends
        else:
            threading.Thread(target=ends_later, daemon=True).start()
        return norm(x)

    def others_in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        if "waiting" in job.fault.variant:
            time.sleep(1.5)
        return norm(x)


class Hosts(Frame):
    description = "the same, and a rejected batch, where the ranks believe that they are on two hosts"
    sizes = (3, 4)
    variants = tuple(
        f"{split}, {moment}" for split in ("halves", "in turn") for moment in (*Frame.variants, "rejected, dims")
    )

    def is_clear(self, fault: Fault, rank: int, errors: dict[int, ErrorReport]) -> bool:
        if "rejected" in fault.variant:
            return errors[fault.rank].text in errors[rank].text and "2D" in errors[rank].text
        return super().is_clear(fault, rank, errors)

    def models(self, job: Job) -> list[Net]:
        ranks = len(job.fault.rows)
        host_of = [rank % 2 if "in turn" in job.fault.variant else 2 * rank // ranks for rank in range(ranks)]
        first_visible = discovery._first_visible

        def on_own_host(notes: list[list[str]], rank: int, own: int) -> tuple[int, int]:
            seen = [note if host_of[row] == host_of[rank] else ["", "", ""] for row, note in enumerate(notes)]
            return first_visible(seen, rank, own)

        discovery._first_visible = on_own_host
        return super().models(job)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        if "rejected" in job.fault.variant:
            job.mark_fault()
            return norm(x[0, 0])
        return super().in_layer(job, norm, x)

    def others_in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        y = super().others_in_layer(job, norm, x)
        transport = comm.transport_of(job.group)
        assert "on 2 hosts" in transport, transport
        return y


class Discover(Ending):
    description = "a rank ends or rests while the ranks find out which of them share memory"
    variants = tuple(
        f"{moment}, {how}"
        for moment in ("file", "first gather", "mapped", "second gather")
        for how in ("SIGKILL", "SIGSTOP", "MemoryError")
    )
    steps, layers = range(1), LAYERS[:1]

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        moment, how = job.fault.variant.split(", ")
        name = {"file": "create_file", "mapped": "_share"}.get(moment, "_gather_notes")
        real, calls = getattr(discovery, name), []

        def ends(*args: Any) -> Any:
            result = real(*args)
            calls.append(result)
            if len(calls) == (2 if moment == "second gather" else 1):
                end(job, how)
            return result

        setattr(discovery, name, ends)
        return norm(x)
