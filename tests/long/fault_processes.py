"""Starts the processes of a job by forking a process that has imported torch, and waits for them to end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import fault_disagreements  # noqa: F401  # registers its kinds
import fault_interruptions  # noqa: F401
import fault_transports  # noqa: F401
from fault_jobs import Fault, Job, rank_process, write_note
from fault_kinds import KINDS

import syncnorm

MARGIN = 15.0  # seconds in which a rank must have raised or finished, on a busy machine
EXITING = 60.0  # seconds for the interpreter to exit after that
STARTING = 90.0  # seconds for a job in which the fault has not happened yet


class Ranks:
    """Starts rank processes by forking, because importing torch again takes seconds of CPU time."""

    def __init__(self, timeout: float) -> None:
        command = [sys.executable, "-X", "faulthandler", __file__, str(timeout)]
        home = str(Path(syncnorm.__file__).parents[1])
        environ = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": home}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(command, env=environ, text=True, **pipes)
        assert self._server.stdout is not None
        self._server.stdout.readline()  # imports are slow on a busy machine and must not count as a job's time
        self._asking = threading.Lock()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def start(self, fault: Fault, notes: Path) -> None:
        """Asks for the processes of one job."""
        assert self._server.stdin is not None
        with self._asking:
            self._server.stdin.write(json.dumps([asdict(fault), str(notes)]) + "\n")
            self._server.stdin.flush()


def processes(fault: Fault) -> range:
    """The numbers of the processes: the ranks, then the helpers."""
    return range(len(fault.rows) + KINDS[fault.kind].helpers)


def serve(timeout: float) -> None:
    """Reads jobs and forks their ranks. Those of every fifth job exit as Python programs do, which is slow."""
    import torch._dynamo  # noqa: F401  # DDP and the optimizer would import it, which takes seconds in each rank

    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while line := sys.stdin.readline():
        fields, notes = json.loads(line)
        fault = Fault(**fields | {"rows": tuple(fields["rows"])})
        for rank in processes(fault):
            if os.fork() == 0:
                if watch(Path(notes), rank):
                    os._exit(0)
                try:
                    rank_process(Job(fault, KINDS[fault.kind], rank, Path(notes), timeout))
                except BaseException:
                    if fault.seed % 5 == 0:
                        raise
                    traceback.print_exc()
                    os._exit(1)
                if fault.seed % 5 == 0:
                    return
                os._exit(0)


def watch(notes: Path, rank: int) -> bool:
    """Forks a rank and records its process id and exit status. Returns False in the rank."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        stderr = os.open(notes / f"stderr{rank}", os.O_CREAT | os.O_WRONLY)
        for theirs in (1, 2):
            os.dup2(stderr, theirs)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        return False
    write_note(notes / f"pid{rank}", str(pid))
    _, status = os.waitpid(pid, 0)
    write_note(notes / f"status{rank}", str(os.waitstatus_to_exitcode(status)))
    return True


def wait(fault: Fault, notes: Path, timeout: float) -> set[int]:
    """Waits for the ranks to end. Kills and returns those that do not end in time."""
    deadline = time.monotonic() + STARTING
    allowed = MARGIN + (timeout if KINDS[fault.kind].waits_for_timeout(fault) else 0)
    alive = set(processes(fault))
    hanging: set[int] = set()
    while alive:
        if (notes / "happened").exists():
            deadline = float((notes / "happened").read_text()) + allowed
        time.sleep(0.05)
        alive = {rank for rank in alive if not (notes / f"status{rank}").exists()}
        lost = {rank for rank in alive if (notes / f"lost{rank}").exists()}
        for rank in alive - hanging - lost:
            ending = (notes / f"error{rank}").exists() or (notes / f"result{rank}").exists()
            if time.monotonic() > deadline + ending * EXITING:
                # faulthandler prints the stacks
                os.kill(int((notes / f"pid{rank}").read_text()), signal.SIGABRT)
                hanging.add(rank)
        if alive == lost:  # a rank that is stopped keeps its connections until the others have ended
            for rank in lost:
                with suppress(ProcessLookupError):  # the last round killed it
                    os.kill(int((notes / f"pid{rank}").read_text()), signal.SIGKILL)
    return hanging


if __name__ == "__main__":
    serve(float(sys.argv[1]))
