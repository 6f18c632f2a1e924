"""What a launcher (torchrun, ``accelerate launch``, Slurm's ``srun``) says through environment variables."""

import os
import sys
import time
from datetime import timedelta
from zlib import crc32

from syncnorm.errors import InputError

# How long other ranks wait for rank 0 to print: a launcher ends all ranks as soon as one has failed.
_MAIN_RANK_PRINTS_S = 5.0


def launched_world_size() -> int | None:
    """The number of ranks that a launcher started; None without a launcher.

    Raises:
        InputError: the launcher's variables are incomplete or are not valid numbers.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        raise InputError(
            f"RANK={os.environ['RANK']!r} and WORLD_SIZE={os.environ['WORLD_SIZE']!r} must be numbers"
        ) from None
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or not 0 <= rank < world_size:
        raise InputError(
            f"RANK={rank} and WORLD_SIZE={world_size} are set, but "
            + (
                f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not"
                if missing
                else "contradict each other"
            )
            + ": start with torchrun, or unset them"
        )
    return world_size


def is_main_rank() -> bool:
    """Whether this process prints: it is rank 0 of a launcher, or was not started by one."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def wait_for_main_rank() -> None:
    """Gives rank 0 time to print before this rank fails: a launcher ends all ranks as soon as one has failed."""
    if not is_main_rank():
        time.sleep(_MAIN_RANK_PRINTS_S)


def print_error_once(message: str) -> None:
    """Prints to stderr why this process ends. Other ranks than 0 print if no rank has printed the same within 5 s."""
    if is_main_rank():
        print(message, file=sys.stderr, flush=True)
    try:
        printed = _printed_by_another_rank(message)
    except RuntimeError:  # includes the errors of torch.distributed: the launcher has closed the store
        printed = False
    if not is_main_rank() and not printed:
        print(f"rank {os.environ['RANK']}: {message}", file=sys.stderr, flush=True)


def _printed_by_another_rank(message: str) -> bool:
    """Asks torchrun's store, which its ranks can use before they have a process group."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or launched_world_size() is None:
        wait_for_main_rank()  # if rank 0 prints and fails meanwhile, the launcher ends this rank
        return False
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it untyped

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_MAIN_RANK_PRINTS_S))
    key = f"syncnorm/error/{crc32(message.encode())}"
    deadline = time.monotonic() + (0 if is_main_rank() else _MAIN_RANK_PRINTS_S)
    while time.monotonic() < deadline and not store.check([key]):
        time.sleep(0.05)
    return bool(store.add(key, 1) > 1)
