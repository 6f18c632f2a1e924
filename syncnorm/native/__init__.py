"""The parts of the library in C, called by ctypes; without a compiler there are none, and Python does their work.

Attributes:
    library: the shared library, or None.
    absent: why it is None, for people; empty if it is not.
    instruction_set: that of the passes which are called, ``"baseline"`` or ``"v3"`` (x86-64-v3: AVX2 and FMA).

``SYNCNORM_NATIVE=0`` in the environment turns it off.
"""

import ctypes
import os

from syncnorm.native.build import COMMAND, LIBRARY, sources_hash

__all__ = ["absent", "instruction_set", "library"]


def _load() -> ctypes.CDLL:
    """The library.

    Raises:
        OSError: there is none to use, and why.
    """
    if os.environ.get("SYNCNORM_NATIVE") == "0":
        raise OSError("turned off by SYNCNORM_NATIVE=0")
    if not LIBRARY.exists():
        raise OSError(f"not compiled: with a C compiler, run {COMMAND} or pip install syncnorm again")
    loaded = ctypes.CDLL(str(LIBRARY))
    loaded.sources.restype = ctypes.c_char_p
    if loaded.sources().decode() != sources_hash():
        raise OSError(f"outdated, its sources have changed: run {COMMAND} or pip install syncnorm again")
    return loaded


library: ctypes.CDLL | None = None
absent = ""
instruction_set = ""
try:
    library = _load()
    has_v3 = hasattr(library, "moments_v3") and library.supports_v3()
    instruction_set = "v3" if has_v3 else "baseline"
except Exception as error:  # whatever is wrong with the file, Python can do the work
    library, absent = None, str(error)
