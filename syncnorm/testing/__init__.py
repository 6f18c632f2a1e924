"""Test distributed code on a CPU: ranks that are kept, an fp64 reference, a check of your own model.

Nothing is imported before it is asked for: the pytest plugin should cost a test run nothing that it does not use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncnorm.testing.oracle import TOLERANCES, BatchNormReference, assert_close, batch_norm_oracle
    from syncnorm.testing.parity import assert_matches_single_process
    from syncnorm.testing.pool import RankError, run_ranks, shutdown

_HOME = {
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
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
