"""What a launcher (torchrun, ``accelerate launch``, Slurm's ``srun``) says through the environment."""

import os
import time

from syncnorm.errors import InputError


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
        time.sleep(2)
