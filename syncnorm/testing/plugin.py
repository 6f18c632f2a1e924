"""The pytest plugin that is installed with syncnorm: its test helpers as fixtures."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

# The fixtures import what they need on first use, because pytest loads this file on every run.


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Callable[..., list[Any]]]:
    """``syncnorm.testing.run_ranks``; its ranks are kept until the end of the session."""
    from syncnorm.testing.pool import run_ranks, shutdown

    yield run_ranks
    shutdown()


@pytest.fixture(scope="session")
def assert_matches_single_process(run_ranks: Callable[..., list[Any]]) -> Callable[..., None]:
    """``syncnorm.testing.assert_matches_single_process``, on the ranks of the fixture ``run_ranks``."""
    from syncnorm.testing.parity import assert_matches_single_process

    return assert_matches_single_process
