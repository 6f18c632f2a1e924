"""Temporary."""

import ctypes
from pathlib import Path

absent = ""
library = None
_p = Path("/tmp/libmail.so")
if _p.exists():
    library = ctypes.CDLL(str(_p))
    library.syncnorm_publish.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.syncnorm_publish.restype = None
    library.syncnorm_wait.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 4]
    library.syncnorm_wait.restype = ctypes.c_int64
