"""The process of a kept rank: it receives a call, joins a new process group, runs the call, reports, and leaves."""

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
from typing import Any

import torch
import torch.distributed as dist

from syncnorm._torch_versions import ONE_GRAPH
from syncnorm.errors import InputError, SyncNormError
from syncnorm.testing._transport import IDLE, STOP, Raised, RankCall, Returned, import_modules

__tracebackhide__ = True  # pytest shows the line of a user's test instead of this file's

SEED = 0
# Added to the timeout of the caller, which names the ranks that hang. This one only ends ranks without a caller.
GROUP_TIMEOUT_MARGIN_S = 60.0
# A rank has this name from its first line on, while it imports the script of its caller.
PROCESS_NAME = "syncnorm rank"
# The exit code of a rank whose caller's script starts ranks while the rank imports it. Python itself uses 1 and 2.
STARTED_BY_IMPORT = 93

_serving = False  # whether main has been called, which is after that import
_importing = False  # whether the modules of a call are being imported


def refuse_while_importing() -> None:
    """Refuse to start ranks in a rank that is importing the code that started it, which would never end.

    Raises:
        SystemExit: It imports its caller's script. The caller says so, and this process ends without a traceback.
        InputError: It imports another module.
    """
    if multiprocessing.current_process().name == PROCESS_NAME and not _serving:
        raise SystemExit(STARTED_BY_IMPORT)
    if _importing:
        raise InputError(
            "a module starts ranks at its top level, and would do so again in each rank, which imports it: put the "
            'call in a function, or under `if __name__ == "__main__":`'
        )


def main(connection: Connection, stacks_path: str) -> None:
    """Serve calls from ``connection`` until it is closed, STOP arrives, or the parent process ends."""
    global _serving
    _serving = True
    # Ctrl-C in a terminal reaches all processes in it, but the caller decides when its ranks end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # likewise when the terminal is closed
    threading.Thread(target=_end_with_parent, args=(os.path.dirname(stacks_path),), daemon=True).start()
    if sys.platform != "win32":
        import resource

        # The caller ends a rank that hangs with SIGABRT, to get its stack, which should not leave a core file.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Its functions have the default argument `group=group.WORLD`. If it is first imported during a call, as by
    # the first DDP, it keeps the group of that call: the sockets stay open, and later calls use a closed group.
    importlib.import_module("torch.distributed.nn.functional")
    if not ONE_GRAPH:  # the first synced layer imports the compiler: seconds that are not those of the first call
        importlib.import_module("torch._dynamo")
    # Exempts all objects that exist by now: the collection after each call takes 10 us instead of 80 ms.
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
        shutil.rmtree(folder, ignore_errors=True)  # the parent has not removed it
        os._exit(1)


def _serve(call: RankCall, connection: Connection) -> None:
    report = _run(call)
    connection.send_bytes(pickle.dumps(report))
    if isinstance(report, Raised):
        # Ranks that wait for this one in a collective fail as soon as its sockets are closed.
        _leave_group()
    # A rank that has returned keeps its sockets open for ranks that still use them.
    connection.recv_bytes()  # LEAVE
    _leave_group()
    if _join_failed:
        os._exit(1)  # the caller starts another process in its place
    connection.send_bytes(IDLE)


def _run(call: RankCall) -> Returned | Raised:
    try:
        _adopt_environment(call)
        fn, args = _load(call)
        _join_group(call)
        return Returned(_dump_result(fn(*args), call.rank))
    except BaseException as error:  # also SystemExit and pytest's outcomes: the process has to survive
        at = time.monotonic()
        # The first entry is this function, which is of no use to the reader.
        after_run = error.__traceback__.tb_next if error.__traceback__ else None
        return Raised(
            summary="".join(traceback.format_exception_only(type(error), error)).strip(),
            traceback="".join(traceback.format_exception(type(error), error, after_run)).rstrip(),
            exception=_dump_exception(error),
            at=at,
        )


def _load(call: RankCall) -> Any:
    global _importing
    _importing = True
    try:
        import_modules(call.modules)
        return _unpickle(call.pickled)
    finally:
        _importing = False


def _unpickle(pickled: bytes) -> Any:
    try:
        return pickle.loads(pickled)
    except AttributeError as error:
        raise InputError(
            f"the ranks cannot import what they were sent ({error}): define it at the top level of its file and not "
            'under `if __name__ == "__main__":`, which they do not execute'
        ) from error


_join_failed = False


def _join_group(call: RankCall) -> None:
    global _join_failed
    # torch names a group by a counter that only destroy_process_group resets. After a failed attempt, for example
    # because another rank raised and left at once, this process would wait forever under a different name.
    _join_failed = True
    store = dist.FileStore(call.store, call.world_size)  # type: ignore[attr-defined]  # torch exports it untyped
    dist.init_process_group(
        "gloo",
        store=store,
        rank=call.rank,
        world_size=call.world_size,
        timeout=timedelta(seconds=call.timeout + GROUP_TIMEOUT_MARGIN_S),
    )
    # Otherwise a rank that raises at once closes its sockets while another is still connecting.
    store.set(f"joined{call.rank}", "1")
    store.wait([f"joined{rank}" for rank in range(call.world_size)])
    _join_failed = False


def _adopt_environment(call: RankCall) -> None:
    """Take over the caller's variables, path and folder as they are now, and reset what the last call changed."""
    os.environ.clear()
    os.environ.update(call.environ)
    for variable, value in (("RANK", call.rank), ("WORLD_SIZE", call.world_size)):
        os.environ[variable] = os.environ[f"LOCAL_{variable}"] = str(value)
    if sys.platform == "linux":
        # Otherwise gloo resolves the name of the host, which fails in many containers.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    sys.path[:] = call.sys_path
    with suppress(OSError):
        os.chdir(call.cwd)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.manual_seed(SEED)


def _dump_result(result: object, rank: int) -> bytes:
    try:
        return pickle.dumps(result)
    except Exception as error:
        raise SyncNormError(
            f"rank {rank} returned a {type(result).__qualname__} that does not pickle ({error}): return tensors, "
            "numbers, strings, or containers of them."
        ) from error


def _dump_exception(error: BaseException) -> bytes | None:
    """The pickle of the exception, or None if it cannot be loaded, as with an ``__init__`` with other arguments."""
    try:
        data = pickle.dumps(error)
        return data if isinstance(pickle.loads(data), type(error)) else None
    except Exception:
        return None


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    # A model in DDP or a traceback is a reference cycle that keeps the group alive, and with it its sockets.
    gc.collect()
