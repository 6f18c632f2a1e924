"""What the installed versions of torch and of Triton can do, for tests that need more than the oldest ones offer."""

import pytest

from syncnorm import _torch_versions
from syncnorm.layer.kernels import launch

one_graph = pytest.mark.skipif(
    not _torch_versions.ONE_GRAPH, reason="before torch 2.13 torch.compile breaks the graph at a synced layer"
)


def why_no_triton() -> str | None:
    """Why the kernels cannot be tested under Triton's compiler or its interpreter; None if they can."""
    return launch._unusable()


def why_no_compiler() -> str | None:
    """Why they cannot be tested under Triton's compiler."""
    return "needs Triton's compiler, and not its interpreter" if launch._INTERPRETED else why_no_triton()
