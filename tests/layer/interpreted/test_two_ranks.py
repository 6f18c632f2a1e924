"""The step in Triton's kernels on two ranks, in Triton's interpreter, compared with fp64 on the whole batch.

The collectives are gloo's own, as NCCL's would be on GPUs.
"""

import gc
import os
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1, before Triton is imported", allow_module_level=True)

import syncnorm
from syncnorm import comm
from syncnorm.layer import checkpointing
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks

CHANNELS = 5
EPS, MOMENTUM = 1e-5, 0.3


class Case(NamedTuple):
    rows: tuple[int, ...] = (3, 2)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous_format"
    relu: bool = False
    shortcut: bool = False
    mask: bool = False
    parameters: torch.dtype = torch.float32
    momentum: float | None = MOMENTUM
    dy: str = "dense"
    recomputed: str = "no"


CASES = {
    "plain": Case(),
    "plain, NHWC": Case((4, 1), layout="channels_last"),
    "empty rank": Case((0, 3)),
    "ReLU": Case((3, 3), relu=True),
    "ReLU, NHWC": Case((4, 1), layout="channels_last", relu=True),
    "ReLU, empty rank": Case((2, 0), relu=True),
    "shortcut": Case(shortcut=True),
    "shortcut and ReLU": Case((3, 3), relu=True, shortcut=True),
    "shortcut and ReLU, bf16, empty rank": Case((0, 3), torch.bfloat16, relu=True, shortcut=True),
    "mask": Case(mask=True),
    "mask, empty rank": Case((3, 0), mask=True),
    "mask, shortcut": Case(shortcut=True, mask=True),
    "mask, shortcut and ReLU, NHWC": Case((2, 4), layout="channels_last", relu=True, shortcut=True, mask=True),
    "bf16 parameters": Case(dtype=torch.bfloat16, parameters=torch.bfloat16),
    "fp16 parameters, ReLU": Case(dtype=torch.float16, parameters=torch.float16, relu=True),
    "average": Case(momentum=None),
    "expanded dy": Case(dy="expanded"),
    "transposed dy, ReLU": Case(dy="transposed", relu=True),
    "recomputed": Case(recomputed="non-reentrant"),
    "recomputed, reentrant, mask, ReLU": Case(recomputed="reentrant", mask=True, relu=True),
}


def batch(case: Case) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs, shortcuts, gradients and masks by rank."""
    generator = torch.Generator().manual_seed(0)
    shape = (sum(case.rows), CHANNELS, 4, 3)
    x, shortcut, dy = ((torch.randn(shape, generator=generator) * 2 + m).to(case.dtype) for m in (3, 0, 0))
    if case.dy == "expanded":
        dy = dy[:, :, :1, :1].expand(shape)
    mask = torch.rand(shape[0], *shape[2:], generator=generator) < (0.7 if case.mask else 2)
    return tuple(list(t.split(case.rows)) for t in (x, shortcut, dy, mask))


def vectors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.rand(CHANNELS, generator=generator) - 0.3, torch.randn(CHANNELS, generator=generator)
    return weight.to(dtype), bias.to(dtype)


def _rank_step(case: Case) -> dict[str, Tensor | None]:
    comm.set_transport(None, "native")
    x, shortcut, dy, mask = (part[dist.get_rank()] for part in batch(case))
    if case.mask:
        x = x.masked_fill(~mask.unsqueeze(1), torch.nan)
    if case.dy == "transposed":
        dy = dy.transpose(2, 3).contiguous().transpose(2, 3)
    x = x.contiguous(memory_format=getattr(torch, case.layout)).requires_grad_()
    shortcut.requires_grad_()
    layer = syncnorm.SyncBatchNorm2d(CHANNELS, eps=EPS, momentum=case.momentum)
    layer.weight, layer.bias = (nn.Parameter(v) for v in vectors(case.parameters))

    def run(x: Tensor) -> Tensor:
        y = layer(x, mask if case.mask else None, residual=shortcut if case.shortcut else None, relu=case.relu)
        if torch.is_grad_enabled():
            assert type(y.grad_fn).__name__ == "_StepBackward"
        return y

    y = run(x) if case.recomputed == "no" else checkpoint(run, x, use_reentrant=case.recomputed == "reentrant")
    y.backward(dy)
    assert y.is_contiguous(memory_format=getattr(torch, case.layout))
    y = y.detach()
    gc.collect()  # the graph, and with it what a recomputation would have needed
    return {
        "y": y,
        "dx": x.grad,
        "d_shortcut": shortcut.grad,
        "dw": layer.weight.grad,
        "db": layer.bias.grad,
        "mean": layer.running_mean,
        "var": layer.running_var,
        "tracked": layer.num_batches_tracked,
        "kept": torch.tensor(sum(len(records) for records in checkpointing._remembered.values())),
    }


def _rank_steps(cases: dict[str, Case]) -> dict[str, dict[str, Tensor | None]]:
    return {name: _rank_step(case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(_rank_steps, 2, (CASES,), timeout=100)


def counted(values: Tensor, mask: Tensor) -> Tensor:
    """The values of all positions that count, (positions, C)."""
    return values.movedim(1, -1)[mask]


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """The inverse of :func:`counted`, with zero at the other positions."""
    all_values = values.new_zeros(*mask.shape, CHANNELS)
    all_values[mask] = values
    return all_values.movedim(-1, 1)


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_that_of_the_whole_batch(name, found):
    case, ranks = CASES[name], [results[name] for results in found]
    inputs, shortcuts, grads, masks = batch(case)
    # Where the ReLU is open is taken from the rank's output, because within rounding of zero either is correct.
    passed = [dy.double() * (got["y"] > 0) if case.relu else dy for dy, got in zip(grads, ranks, strict=True)]
    want = batch_norm_oracle(
        *([counted(t, m) for t, m in zip(values, masks, strict=True)] for values in (inputs, passed)),
        *vectors(case.parameters), torch.zeros(CHANNELS), torch.ones(CHANNELS), case.momentum or 1.0, EPS,
    )  # fmt: skip
    for rank, got in enumerate(ranks):
        z = want.outputs[rank] + (counted(shortcuts[rank].double(), masks[rank]) if case.shortcut else 0)
        assert_close(got["y"], spread(z.relu() if case.relu else z, masks[rank]), case.dtype)
        assert_close(got["dx"], spread(want.grad_inputs[rank], masks[rank]), case.dtype)
        assert_close(got["dw"], want.grad_weight[rank], case.parameters)
        assert_close(got["db"], want.grad_bias[rank], case.parameters)
        assert_close(got["mean"], want.running_mean, torch.float32)
        assert_close(got["var"], want.running_var, torch.float32)
        assert got["dw"].dtype == got["db"].dtype == case.parameters
        assert got["tracked"] == 1
        assert got["kept"] == 0
        if case.shortcut:
            assert torch.equal(got["d_shortcut"].double(), passed[rank].double() * masks[rank].unsqueeze(1))


def _rank_fp64_and_strided_weight() -> tuple[bool, bool]:
    comm.set_transport(None, "native")
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(3, CHANNELS, 2, 2, generator=generator)
    layer = syncnorm.SyncBatchNorm2d(CHANNELS, dtype=torch.float64)
    wide = layer(x.double(), relu=True)
    strided = torch.rand(2 * CHANNELS, generator=torch.Generator().manual_seed(1))[::2]
    y, z = (
        syncnorm.functional.sync_batch_norm(x, None, None, w, None, training=True, relu=True, layer_name=name)
        for name, w in (("strided", strided), ("dense", strided.contiguous()))
    )
    return torch.allclose(wide, layer(x.double()).relu(), rtol=1e-13, atol=1e-13), torch.equal(y, z)


def test_fp64_input_and_a_strided_weight():
    assert run_ranks(_rank_fp64_and_strided_weight, 2) == [(True, True)] * 2


def _rank_penalty(relu: bool, mask: bool) -> str | list[Tensor]:
    """The gradients of a gradient penalty, by the kernels' step and, in fp64, by the generic one."""
    comm.set_transport(None, "native")
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, shortcut = (torch.randn(2, 3, 2, 2, generator=generator) for _ in range(2))
    positions = torch.rand(2, 2, 2, generator=generator) < 0.7 if mask else None
    found = []
    for dtype in (torch.float32, torch.float64):
        layer = syncnorm.SyncBatchNorm2d(3, dtype=dtype)
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, shortcut)]
        y = layer(inputs[0], positions, residual=inputs[1], relu=relu)
        (dx,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
        try:
            dx.square().sum().backward()
        except RuntimeError as error:
            return str(error)
        found += [inputs[0].grad, inputs[1].grad, layer.weight.grad]
    return found


def test_a_second_derivative_through_the_relu_raises():
    assert all("once_differentiable" in told for told in run_ranks(_rank_penalty, 2, (True, False)))


@pytest.mark.parametrize("mask", [False, True])
def test_second_derivatives_without_a_relu(mask):
    for gradients in run_ranks(_rank_penalty, 2, (False, mask)):
        for got, want in zip(gradients[:3], gradients[3:], strict=True):
            assert_close(got, want, torch.float32)


def _rank_hooks(to: torch.dtype, relu: bool) -> list[Tensor]:
    """Gradients with hooks that keep all saved tensors in another dtype, and without."""
    comm.set_transport(None, "native")
    generator = torch.Generator().manual_seed(dist.get_rank())
    # Values that bf16 represents, so that the hooks lose little.
    x, dy = (torch.randint(-8, 8, (4, 3, 2, 2), generator=generator).float() for _ in range(2))
    gradients = []
    for changes in (True, False):
        layer = syncnorm.SyncBatchNorm2d(3)
        inputs = x.clone().requires_grad_()

        def pack(saved: Tensor, changes: bool = changes) -> Tensor:
            return saved.to(to) if changes and saved.is_floating_point() else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            y = layer(inputs, relu=relu)
        y.backward(dy)
        gradients += [inputs.grad, layer.weight.grad]
    return gradients


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("to", "tolerance"), [(torch.bfloat16, 0.05), (torch.float64, 1e-5)], ids=str)
def test_hooks_of_saved_tensors_may_change_their_dtype(to, tolerance, relu):
    for hooked_dx, hooked_dw, dx, dw in run_ranks(_rank_hooks, 2, (to, relu)):
        torch.testing.assert_close(hooked_dx, dx, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(hooked_dw, dw, rtol=tolerance, atol=tolerance * 10)


def _rank_segments() -> dict[str, Any]:
    """Two batches through a checkpointed layer, backwards in the other order; then a segment that calls it twice."""
    comm.set_transport(None, "native")
    layer, reads = syncnorm.SyncBatchNorm2d(CHANNELS), []
    lookup = checkpointing.lookup
    checkpointing.lookup = lambda *args: reads.append(args[0]) or lookup(*args)
    try:
        inputs = [x.requires_grad_() for x in torch.randn(2, 3, CHANNELS, 2, 2).unbind()]
        outputs = [checkpoint(layer, x, use_reentrant=False) for x in inputs]
        tracked = int(layer.num_batches_tracked)
        for y in reversed(outputs):
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)))
        once = len(reads)
        x = inputs[0].detach().clone().requires_grad_()
        checkpoint(lambda x: layer(layer(x) * 2 + 1), x, use_reentrant=False).sum().backward()
    finally:
        checkpointing.lookup = lookup
    plain = []
    for given in inputs:
        z = given.detach().clone().requires_grad_()
        layer(z).backward(torch.randn(z.shape, generator=torch.Generator().manual_seed(0)))
        plain.append(z.grad)
    return {"dx": [x.grad for x in inputs], "plain": plain, "tracked": tracked, "once": once, "twice": len(reads)}


def test_a_recomputation_compares_values_only_within_a_segment():
    for got in run_ranks(_rank_segments, 2):
        torch.testing.assert_close(got["dx"], got["plain"], rtol=1e-5, atol=1e-6)
        assert got["tracked"] == 2
        assert got["once"] == 0
        assert got["twice"] == 2


def _rank_unsynced_segment() -> list[Tensor]:
    """A segment that only rank 0 runs, under no_sync_stats, and that is recomputed outside of it."""
    comm.set_transport(None, "native")
    layer = syncnorm.convert(nn.BatchNorm2d(CHANNELS))
    x = torch.randn(3, CHANNELS, 2, 2)
    layer(x)
    if dist.get_rank() == 1:
        return []
    before = layer.running_mean.clone()
    x = x.requires_grad_()
    with syncnorm.no_sync_stats():
        y = checkpoint(layer, x, use_reentrant=False)
    dy = torch.randn_like(x)
    y.backward(dy)
    z = x.detach().requires_grad_()
    nn.functional.batch_norm(z, None, None, training=True).backward(dy)
    return [x.grad, z.grad, before, layer.running_mean]


def test_a_segment_under_no_sync_stats():
    (dx, want, before, after), _ = run_ranks(_rank_unsynced_segment, 2)
    torch.testing.assert_close(dx, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(before, after)


def _rank_under_modes() -> list[Tensor]:
    """Gradients of a step under other defaults, which are those of the group's first call; then without them."""
    comm.set_transport(None, "native")
    found = []
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, dy = (torch.randn(3, CHANNELS, 2, 2, generator=generator) for _ in range(2))
    for changed in (True, False):
        layer, inputs = syncnorm.SyncBatchNorm2d(CHANNELS), x.clone().requires_grad_()
        torch.set_default_dtype(torch.float64 if changed else torch.float32)
        try:
            with torch.device("meta") if changed else nullcontext():
                y = layer(inputs, relu=True)
                y.backward(dy)
        finally:
            torch.set_default_dtype(torch.float32)
        found += [y.detach(), inputs.grad, layer.weight.grad, layer.running_var]
    return found


def test_the_defaults_of_torch_do_not_matter():
    for found in run_ranks(_rank_under_modes, 2):
        for got, want in zip(found[:4], found[4:], strict=True):
            assert torch.equal(got, want)


def _rank_with_a_trainable_shortcut_alone(dtype: torch.dtype) -> Tensor:
    comm.set_transport(None, "native")
    layer = syncnorm.SyncBatchNorm2d(CHANNELS).requires_grad_(False)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, dy = (torch.randn(3, CHANNELS, 2, 2, generator=generator) for _ in range(2))
    # fp64 is not the kernels' step; that rank makes no collective, either.
    shortcut = torch.zeros_like(x, dtype=dtype).requires_grad_()
    mask = torch.rand(3, 2, 2, generator=generator) < 0.7
    y = layer(x, mask, residual=shortcut, relu=True)
    if dist.get_rank() == 0:
        y.backward(dy.to(y.dtype))
        return torch.stack([shortcut.grad, dy.masked_fill(~mask.unsqueeze(1), 0) * (y.detach() > 0)])
    return torch.zeros(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_backward_for_the_shortcut_alone_needs_no_other_rank(dtype):
    got, want = run_ranks(_rank_with_a_trainable_shortcut_alone, 2, (dtype,))[0]
    assert torch.equal(got, want)
