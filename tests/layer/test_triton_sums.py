"""The kernels of the forward's sum, compiled ahead of time for GPUs that are not there."""

import pytest
import torch
from versions import why_no_compiler

if reason := why_no_compiler():
    pytest.skip(reason, allow_module_level=True)

from stand_in_gpu import spills, stand_in_gpu

from syncnorm.layer.kernels.triton_forward import pack_moments
from syncnorm.layer.kernels.triton_sums import merge_sums
from syncnorm.layer.moments import Running


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("sm", [75, 90, 120])
def test_both_kernels_compile_to_one_launch_each(sm, momentum):
    x = torch.empty(8, 64, 14, 14, dtype=torch.bfloat16, device="meta")
    vectors = (torch.empty(64, device="meta") for _ in range(2))
    running = Running(*vectors, torch.empty((), dtype=torch.int64, device="meta"), momentum)
    with stand_in_gpu(sm) as gpu:
        row = pack_moments(x, 1e-5, 7.0, None, to_sum=True)
        mismatch = torch.empty((), dtype=torch.int64, device="meta")
        found = merge_sums(row, 1e-5, 7.0 * 1024, mismatch, 3, running)
        merge_sums(row, 1e-5, 7.0 * 1024, mismatch, 4, None)
    assert gpu.names() == ["_moments_kernel", "_merge_sums_kernel", "_merge_sums_kernel"]
    assert not any(spills(launch.kernel) for launch in gpu.launches)
    assert [v.dtype for v in found] == [torch.float32] * 3 + [torch.float64]
