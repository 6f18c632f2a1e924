"""``torch.compile`` of models whose graph breaks, and next to eager ranks.

Before torch 2.13 every synced layer is such a break.
"""

import models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from versions import one_graph

import syncnorm
from syncnorm.testing import assert_close, run_ranks

ROWS = (5, 3)
HOW = {
    "compiled": ("compiled", "compiled"),
    "rank 0 is eager": ("eager", "compiled"),
    "DDP is compiled": ("DDP is compiled", "DDP is compiled"),
    "compiled in DDP": ("compiled in DDP", "compiled in DDP"),
}


class Broken(nn.Module):
    """A network with a break of its own between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = models.net(), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).sin()
        torch._dynamo.graph_break()
        return self.second(x).cos()


def train(how: str, rows: slice) -> list[Tensor]:
    """Outputs and gradients of x of two steps, then parameters and buffers; of the samples in ``rows``."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = syncnorm.convert(Broken()).double()
    call = torch.compile(model, backend="aot_eager") if how.startswith("compiled") else model
    if dist.is_initialized():  # also for eager ranks: DDP divides the sum of gradients by the number of ranks
        call = DistributedDataParallel(call)
    if how == "DDP is compiled":
        call = torch.compile(call, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    results = []
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        x, dy = (torch.randn(8, *shape, generator=generator).double()[rows] for shape in ((3, 6, 6), (4,)))
        x.requires_grad_()
        optimizer.zero_grad()
        y = call(x)
        y.backward(dy)
        if dist.is_initialized():
            for parameter in model.parameters():
                parameter.grad *= dist.get_world_size()
        optimizer.step()
        results += [y.detach(), x.grad]
    assert how == "eager" or torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
    return [*results, *(p.detach() for p in model.parameters()), *model.buffers()]


def _rank_train(hows: tuple[str, str]) -> list[Tensor]:
    rank = dist.get_rank()
    return train(hows[rank], slice(0, ROWS[0]) if rank == 0 else slice(ROWS[0], None))


@pytest.mark.parametrize("hows", HOW.values(), ids=HOW)
def test_ranks_train_like_one_process_with_the_whole_batch(hows):
    whole = train("eager", slice(None))
    ranks = run_ranks(_rank_train, args=(hows,), timeout=100)
    for index, want in enumerate(whole):
        for got, part in zip(ranks, want.split(ROWS) if index < 4 else (want, want), strict=True):
            assert_close(got[index], part, torch.float64)


def _rank_refused(fullgraph: bool) -> str:
    torch._dynamo.reset()
    layer = torch.compile(syncnorm.SyncBatchNorm2d(3), backend="aot_eager", fullgraph=fullgraph)
    channels = 3 + dist.get_rank()
    try:
        layer(torch.randn(2, channels, 4, 4))
    except Exception as error:
        return str(error)
    return ""


@pytest.mark.parametrize("fullgraph", [pytest.param(True, marks=one_graph), False])
def test_bad_input_on_one_rank_raises_on_all(fullgraph):
    errors = run_ranks(_rank_refused, args=(fullgraph,), timeout=60)
    assert "rank 1 did not take part" in errors[0]
    for rank, text in enumerate(errors):
        assert "expected 3 channels in dimension 1, got 4" in text, (rank, text)


BAD = {
    "channels": lambda x: (x[:, :2], None),
    "dtype": lambda x: (x.int(), None),
    "dimensions": lambda x: (x.flatten(), None),
    "mask": lambda x: (x, torch.ones(7, dtype=torch.bool)),
    "mask's dtype": lambda x: (x, torch.ones(x.size(0), 1, 1)),
}


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        self.num_batches_tracked.add_(1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps)


class Catching(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        try:
            return self.norm(x)
        except ValueError:
            return x * 1


class Unbroken(Catching):
    def forward(self, x):
        with torch._dynamo.error_on_graph_break(True):
            return self.norm(x)


MODELS = {
    "layer": lambda: syncnorm.SyncBatchNorm(3),
    "a forward of its own": lambda: OwnForward(3),
    "two layers": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
    "error_on_graph_break": Unbroken,
    "catches the error": Catching,
}


def _rank_refused_again_and_again(fullgraph: bool, model: str, kind: str) -> list[str]:
    """What each of nine steps ended with: in the first, fourth, fifth and last, rank 1 has a bad input."""
    torch._dynamo.reset()
    compiled = torch.compile(syncnorm.convert(MODELS[model]()), backend="aot_eager", fullgraph=fullgraph)
    found = []
    for step in range(9):
        x, mask = torch.randn(2 + step % 3, 3, 4, 4, requires_grad=True), None
        if dist.get_rank() == 1 and step in (0, 3, 4, 8):
            x, mask = BAD[kind](x)
        try:
            y = compiled(x) if mask is None else compiled(x, mask)
            y.backward(torch.randn_like(y))
            found.append("")
        except Exception as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        *(("layer", kind) for kind in BAD),
        ("a forward of its own", "channels"),
        ("two layers", "dtype"),
        pytest.param("error_on_graph_break", "channels", marks=one_graph),
        ("catches the error", "channels"),
    ],
)
@pytest.mark.parametrize("fullgraph", [pytest.param(True, marks=one_graph), False])
def test_ranks_stay_in_step_after_bad_input(fullgraph, model, kind):
    """A trace that fails, and the same code in eager mode after it, report an error once."""
    ranks = run_ranks(_rank_refused_again_and_again, args=(fullgraph, model, kind), timeout=60)
    for rank, found in enumerate(ranks):
        if (rank, model, fullgraph) == (1, "catches the error", False):
            assert found == [""] * 9
        else:
            assert [step for step, error in enumerate(found) if error] == [0, 3, 4, 8]
            assert all("rank 1: expected" in error for error in found if error)


def _rank_exports(strict: bool) -> list[str]:
    """The errors of two steps: rank 1 exports its layer with a bad input in the first."""
    layer, found = syncnorm.SyncBatchNorm(3), []
    for channels in (4, 3):
        try:
            if dist.get_rank() == 1 and channels == 4:
                torch.export.export(layer, (torch.randn(2, channels, 4, 4),), strict=strict)
            layer(torch.randn(2, 3, 4, 4))
            found.append("")
        except Exception as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("strict", [pytest.param(True, marks=one_graph), False])
def test_bad_input_of_an_export_raises_on_all(strict):
    for first, second in run_ranks(_rank_exports, args=(strict,), timeout=60):
        assert "rank 1: expected 3 channels in dimension 1, got 4" in first
        assert second == ""


def _rank_ddp_steps(how: str) -> list[Tensor]:
    torch._dynamo.reset()
    model = syncnorm.convert(models.net()).double()
    if how == "compiled inside":
        ddp = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
    else:
        ddp = DistributedDataParallel(model)
    call = torch.compile(ddp, backend="aot_eager") if how == "compiled outside" else ddp
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        x, dy = torch.randn(8, 3, 6, 6, generator=generator).double(), torch.randn(8, 4, generator=generator).double()
        optimizer.zero_grad()
        call(x.split([5, 3])[dist.get_rank()]).backward(dy.split([5, 3])[dist.get_rank()])
        optimizer.step()
    return [*model.parameters(), *model.buffers()]


@pytest.mark.slow
def test_ddp_inside_and_outside():
    want = run_ranks(_rank_ddp_steps, args=("eager",))
    for how in ("compiled inside", "compiled outside"):
        for got, expected in zip(run_ranks(_rank_ddp_steps, args=(how,), timeout=100), want, strict=True):
            torch.testing.assert_close(got, expected)
