"""What runs inside a kept rank: take a task, join a fresh process group, call, report, leave the group."""

import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from syncnorm.errors import SyncNormError
from syncnorm.testing._transport import IDLE, STOP, Raised, Returned, Task, import_modules

SEED = 0
# Beyond the caller's own timeout, which names the ranks that hang: this one only ends ranks that nobody
# watches.
GROUP_TIMEOUT_MARGIN = 60.0


def main(connection: Connection, stacks_path: str) -> None:
    """Serve tasks from ``connection`` until it closes, or says to stop, or the parent process ends."""
    # Ctrl-C reaches the whole terminal: the caller is the one who decides what becomes of its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # so does the end of the terminal
    threading.Thread(target=_end_with_parent, args=(os.path.dirname(stacks_path),), daemon=True).start()
    if sys.platform != "win32":
        import resource

        # The caller ends a rank that hangs by SIGABRT, to have its stack: that should leave no core file.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Its functions have `group=group.WORLD` as a default. Whoever imports it first inside a task, and a
    # first DDP does, would pin that task's group there: its sockets stay open, and later tasks use a dead
    # group.
    importlib.import_module("torch.distributed.nn.functional")
    # What is loaded by now stays: without it, the collection after each task costs 10 us instead of 80 ms.
    gc.collect()
    gc.freeze()
    with open(stacks_path, "w") as stacks:
        faulthandler.enable(stacks, all_threads=True)
        connection.send_bytes(IDLE)
        with suppress(EOFError, ConnectionError):
            while (message := connection.recv_bytes()) != STOP:
                _serve(pickle.loads(message), connection)
        faulthandler.disable()


def _end_with_parent(folder: str) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(folder, ignore_errors=True)  # which the parent could not
        os._exit(1)


def _serve(task: Task, connection: Connection) -> None:
    report = _run(task)
    connection.send_bytes(pickle.dumps(report))
    if isinstance(report, Raised):
        # Peers that wait for this rank in a collective fail as soon as its sockets close.
        _leave_group()
    # A rank that is done early keeps its sockets open for those that still use them.
    connection.recv_bytes()
    _leave_group()
    if _out_of_step:
        os._exit(1)  # the caller starts another in its place
    connection.send_bytes(IDLE)


def _run(task: Task) -> Returned | Raised:
    try:
        _take_surroundings(task)
        import_modules(task.modules)
        fn, args = pickle.loads(task.call)
        _join_group(task)
        return Returned(_dump_result(fn(*args), task.rank))
    except BaseException as error:  # SystemExit and pytest's outcomes too: the rank has to live on
        at = time.monotonic()
        # The first entry is this function, which tells the reader nothing.
        after_run = error.__traceback__.tb_next if error.__traceback__ else None
        return Raised(
            summary="".join(traceback.format_exception_only(type(error), error)).strip(),
            traceback="".join(traceback.format_exception(type(error), error, after_run)).rstrip(),
            exception=_dump_exception(error),
            at=at,
        )


_out_of_step = False


def _join_group(task: Task) -> None:
    global _out_of_step
    # torch names a group by a count of them, which only destroy_process_group sets back. After a failed attempt,
    # because a peer raised and left at once, this process would wait for ever under another name than the others.
    _out_of_step = True
    store = dist.FileStore(task.store, task.world_size)  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo",
        store=store,
        rank=task.rank,
        world_size=task.world_size,
        timeout=timedelta(seconds=task.timeout + GROUP_TIMEOUT_MARGIN),
    )
    # A rank that raises at once would close its sockets on one that is still connecting to others.
    store.set(f"joined{task.rank}", "1")
    store.wait([f"joined{rank}" for rank in range(task.world_size)])
    _out_of_step = False


def _take_surroundings(task: Task) -> None:
    """Look like the caller does now, not like it did when this process was spawned; forget the last task."""
    os.environ.clear()
    os.environ.update(task.environ)
    for variable, value in (("RANK", task.rank), ("WORLD_SIZE", task.world_size)):
        os.environ[variable] = os.environ[f"LOCAL_{variable}"] = str(value)
    if sys.platform == "linux":
        # Else gloo asks the host's name, which resolves to nothing in many containers.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    sys.path[:] = task.sys_path
    with suppress(OSError):
        os.chdir(task.cwd)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.manual_seed(SEED)


def _dump_result(result: object, rank: int) -> bytes:
    try:
        return pickle.dumps(result)
    except Exception as error:
        raise SyncNormError(
            f"rank {rank} returned a {type(result).__qualname__} that does not pickle ({error}); "
            "return tensors, numbers, strings, or containers of them."
        ) from error


def _dump_exception(error: BaseException) -> bytes | None:
    """The exception's pickle, or None if it would not load again (an ``__init__`` with its own arguments)."""
    try:
        data = pickle.dumps(error)
        return data if isinstance(pickle.loads(data), type(error)) else None
    except Exception:
        return None


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    # A model wrapped in DDP, or a traceback, is a cycle that holds the group, and the group its sockets.
    gc.collect()
