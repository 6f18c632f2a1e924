"""Test distributed code on a CPU: ranks that stay alive between calls, an fp64 reference, a check of your own model.

Everything is imported on first use, so that the pytest plugin does not slow down test runs that do not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncnorm.testing.oracle import TOLERANCES, BatchNormReference, assert_close, batch_norm_oracle
    from syncnorm.testing.parity import assert_matches_single_process
    from syncnorm.testing.pool import RankError, run_ranks, shutdown

_MODULES = {
    "TOLERANCES": "oracle",
    "BatchNormReference": "oracle",
    "RankError": "pool",
    "assert_close": "oracle",
    "assert_matches_single_process": "parity",
    "batch_norm_oracle": "oracle",
    "run_ranks": "pool",
    "shutdown": "pool",
}

__all__ = [
    "TOLERANCES",
    "BatchNormReference",
    "RankError",
    "assert_close",
    "assert_matches_single_process",
    "batch_norm_oracle",
    "run_ranks",
    "shutdown",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
