"""What a launcher (torchrun, ``accelerate launch``, Slurm's ``srun``) says through the environment."""

import os
import sys
import time
from datetime import timedelta
from zlib import crc32

from syncnorm.errors import InputError

_RANK_0_SPEAKS = 5.0  # seconds that others wait for its word: a launcher ends all ranks as soon as one has failed


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


def speaks() -> bool:
    """Whether this process prints: rank 0 of a launcher's, or the only one."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def let_rank_0_speak() -> None:
    """Before a rank that does not print fails: a launcher ends all ranks as soon as one has failed."""
    if not speaks():
        time.sleep(_RANK_0_SPEAKS)


def say_once(message: str) -> None:
    """Prints to stderr what ends this process: rank 0 at once, another rank if none has said the same in 5 s."""
    if speaks():
        print(message, file=sys.stderr, flush=True)
    try:
        said = _said(message)
    except RuntimeError:  # torch.distributed's errors are: the store went with the launcher, so nobody knows
        said = False
    if not speaks() and not said:
        print(f"rank {os.environ['RANK']}: {message}", file=sys.stderr, flush=True)


def _said(message: str) -> bool:
    """Whether another rank has; torchrun's store knows, which its ranks have before they have a process group."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or launched_world_size() is None:
        let_rank_0_speak()  # and have all ended, if it does
        return False
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it untyped

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_RANK_0_SPEAKS))
    said = f"syncnorm/error/{crc32(message.encode())}"
    deadline = time.monotonic() + (0 if speaks() else _RANK_0_SPEAKS)
    while time.monotonic() < deadline and not store.check([said]):
        time.sleep(0.05)
    return bool(store.add(said, 1) > 1)
