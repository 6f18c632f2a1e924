"""What the installed versions of torch and of Triton can do, for tests that need more than the oldest ones offer."""

import pytest
import torch
import torch.distributed

from syncnorm import _torch_versions
from syncnorm.layer.kernels import launch

one_graph = pytest.mark.skipif(
    not _torch_versions.ONE_GRAPH, reason="before torch 2.13 torch.compile breaks the graph at a synced layer"
)

# 2.11 has the kernel, 2.10 does not.
fake_collectives = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("c10d::_allgather_base_", "Meta"),
    reason="this torch has no collectives of fake tensors",
)

copied_stores = pytest.mark.skipif(
    not hasattr(torch.distributed.Store, "clone"),
    reason="torch 2.6 has one connection to a store",
)
sharded_on_cpus = pytest.mark.skipif(
    _torch_versions.VERSION < (2, 9),
    reason="on CPUs fully_shard fails in torch 2.6, and sums gradients in 2.7 and 2.8 instead of averaging them",
)


def why_no_triton() -> str | None:
    """Why the kernels cannot be tested under Triton's compiler or its interpreter; None if they can."""
    return launch._unusable()


def why_no_compiler() -> str | None:
    """Why they cannot be tested under Triton's compiler."""
    return "needs Triton's compiler, and not its interpreter" if launch._INTERPRETED else why_no_triton()
