"""The step of a synced layer in Triton's kernels and in torch's, compared with fp64, in a fake world of eight ranks.

Compiled on a GPU, otherwise under Triton's interpreter, which ``tests/layer/test_triton.py`` selects.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils.checkpoint import checkpoint

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

from device_steps import DEVICE, INTERPRETED, VARIANTS, Variant, fake_ranks, in_fp64, make_step, triton_failing

import syncnorm
from syncnorm.comm.communicator import Communicator
from syncnorm.layer.kernels import launch
from syncnorm.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch calls it a prototype
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def eight_ranks() -> Iterator[None]:
    with fake_ranks():
        yield


@contextmanager
def no_host_sync() -> Iterator[None]:
    """On a GPU it raises where the host waits."""
    if INTERPRETED:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("passes", ["Triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_equals_fp64(name, channels_last, dtype, passes, monkeypatch):
    if INTERPRETED and (dtype != torch.float32 or (passes == "torch" and not channels_last)):
        pytest.skip("slow in the interpreter, and compared by other tests on the CPU")
    if passes == "torch":
        monkeypatch.setattr(launch, "passes_available", lambda device: False)
    elif not launch.passes_available(DEVICE):
        pytest.skip("needs Triton")
    step = make_step(VARIANTS[name], dtype, channels_last)
    y = step.forward("first")
    assert (type(y.grad_fn).__name__ == "_StepBackward") == (passes == "Triton")
    step = make_step(VARIANTS[name], dtype, channels_last)
    want = in_fp64(step, y)
    got = step() | {f"running {key}": value for key, value in step.buffers.items()}
    for key, value in got.items():
        kind = dtype if key in ("y", "x", "shortcut") else VARIANTS[name].parameters
        assert_close(value, want[key], torch.float32 if key.startswith("running") else kind)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert got["y"].is_contiguous(memory_format=layout)
    assert got["x"].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("passes", ["Triton", "torch"])
@pytest.mark.parametrize("name", ["plain", "mask and ReLU", "average"])
def test_a_forward_that_sums_equals_fp64(name, passes, monkeypatch):
    monkeypatch.setenv("SYNCNORM_FORWARD", "sum")
    if passes == "torch":
        monkeypatch.setattr(launch, "passes_available", lambda device: False)
    y = make_step(VARIANTS[name]).forward("first")
    step = make_step(VARIANTS[name])
    want = in_fp64(step, y, "sum")
    got = step() | {f"running {key}": value for key, value in step.buffers.items()}
    for key, value in got.items():
        assert_close(value, want[key], torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="nothing waits on the CPU")
@pytest.mark.parametrize("forward", ["gather", "sum"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_does_not_wait_for_the_gpu(name, forward, monkeypatch):
    monkeypatch.setenv("SYNCNORM_FORWARD", forward)
    step = make_step(VARIANTS[name])
    step()
    with no_host_sync():
        step()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["plain", "mask and ReLU"])
def test_a_recomputed_step_does_not_wait_for_the_gpu(name, reentrant):
    step = make_step(VARIANTS[name])
    plain = step()

    def run() -> torch.Tensor:
        y = checkpoint(lambda x: step.forward(), step.x, use_reentrant=reentrant)
        torch.autograd.backward(y, step.dy)
        return y

    run()
    step.x.grad = None
    before = int(step.buffers["tracked"])
    with no_host_sync():
        y = run()
    assert int(step.buffers["tracked"]) == before + 1
    torch.testing.assert_close(y, plain["y"])
    torch.testing.assert_close(step.x.grad, plain["x"])


@pytest.mark.parametrize(
    ("forward", "out_of_step_in"), [("gather", "forward"), ("sum", "forward"), ("gather", "backward")]
)
def test_a_wrong_tag_gives_nan_and_an_error_at_the_next_call(forward, out_of_step_in, monkeypatch):
    monkeypatch.setenv("SYNCNORM_FORWARD", forward)
    name = "encoder." * 37 + "norm"  # 300 characters
    step = make_step(VARIANTS["ReLU"])
    step.name = name
    step()
    before = {key: value.clone() for key, value in step.buffers.items()}
    pass_name = "gather" if (forward, out_of_step_in) == ("gather", "forward") else "sum_"
    collective = getattr(Communicator, pass_name)

    def out_of_step(self: Communicator, *tensors: torch.Tensor) -> object:
        done = collective(self, *tensors)
        tensors[0][-1] += 1  # the last tag
        return done

    with monkeypatch.context() as patch, no_host_sync():
        patch.setattr(Communicator, pass_name, out_of_step)
        poisoned = step.forward() if out_of_step_in == "forward" else step()["x"]
    assert poisoned.isnan().all()
    if out_of_step_in == "forward":
        assert all(torch.equal(step.buffers[key], value) for key, value in before.items())
    with pytest.raises(syncnorm.SyncNormError, match="another rank did not run") as raised:
        step()
    assert name in str(raised.value)
    step()  # it was reported once


def test_a_long_name_is_no_disagreement():
    step = make_step(Variant())
    for _ in range(2):
        assert step.forward("x" * 300).isfinite().all()


def test_where_triton_cannot_compile_torchs_kernels_do_the_same():
    step = make_step(VARIANTS["shortcut and ReLU"])
    with triton_failing():
        with pytest.warns(UserWarning, match="Failed to find C compiler") as caught:
            y = step.forward("first")
        assert len(caught) == 1
        assert type(y.grad_fn).__name__ != "_StepBackward"
        assert not launch.passes_available(DEVICE)
        step = make_step(VARIANTS["shortcut and ReLU"])
        want = in_fp64(step, y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = step()
    for key, value in got.items():
        assert_close(value, want[key], torch.float32)
    assert type(step.forward().grad_fn).__name__ == "_StepBackward"
