"""What a launcher (torchrun, ``accelerate launch``, Slurm's ``srun``) says through the environment."""

import os
import sys
import time
from datetime import timedelta
from zlib import crc32

from syncnorm.errors import InputError

# Seconds that other ranks give rank 0 to print: a launcher ends all ranks as soon as one has failed.
_MAIN_RANK_PRINTS_S = 5.0


def launched_world_size() -> int | None:
    """The number of ranks that a launcher started; None without a launcher.

    Raises:
        InputError: the environment is that of a launcher in part, or not a number.
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
            f"RANK={rank} and WORLD_SIZE={world_size} are set"
            + (f", but {' and '.join(missing)} not" if missing else ", which do not go together")
            + ": start with torchrun, or unset them"
        )
    return world_size


def is_main_rank() -> bool:
    """Whether this process prints: rank 0 of a launcher's, or the only one."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def wait_for_main_rank() -> None:
    """Before a rank that does not print fails: a launcher ends all ranks as soon as one has failed."""
    if not is_main_rank():
        time.sleep(_MAIN_RANK_PRINTS_S)


def print_error_once(message: str) -> None:
    """Prints to stderr what ends this process: rank 0 at once, another rank if none has said the same in 5 s."""
    if is_main_rank():
        print(message, file=sys.stderr, flush=True)
    try:
        said = _said(message)
    except RuntimeError:  # torch.distributed's errors are: the store went with the launcher, so nobody knows
        said = False
    if not is_main_rank() and not said:
        print(f"rank {os.environ['RANK']}: {message}", file=sys.stderr, flush=True)


def _said(message: str) -> bool:
    """Whether another rank has; torchrun's store knows, which its ranks have before they have a process group."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or launched_world_size() is None:
        wait_for_main_rank()  # and have all ended, if it does
        return False
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it untyped

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_MAIN_RANK_PRINTS_S))
    said = f"syncnorm/error/{crc32(message.encode())}"
    deadline = time.monotonic() + (0 if is_main_rank() else _MAIN_RANK_PRINTS_S)
    while time.monotonic() < deadline and not store.check([said]):
        time.sleep(0.05)
    return bool(store.add(said, 1) > 1)
