"""The public face: names, signatures, weight of the import, examples in docstrings, the house's own rules."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import syncnorm

PACKAGE = Path(syncnorm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def test_promised_names():
    for name in syncnorm.__all__:
        assert hasattr(syncnorm, name), name
    assert list(inspect.signature(syncnorm.functional.sync_batch_norm).parameters)[:10] == [
        *inspect.signature(nn.functional.batch_norm).parameters,
        "process_group",
        "mask",
    ]
    assert callable(syncnorm.testing.run_ranks)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = syncnorm.nothing


@pytest.mark.parametrize("cls", [syncnorm.SyncBatchNorm, syncnorm.SyncBatchNorm1d, syncnorm.SyncBatchNorm2d])
def test_constructor_is_torchs(cls):
    ours, theirs = (list(inspect.signature(c).parameters) for c in (cls, nn.SyncBatchNorm))
    assert ours == theirs


def test_state_dict_moves_to_and_from_torchs_layers():
    for other in (nn.BatchNorm2d(4), nn.SyncBatchNorm(4)):
        ours = syncnorm.SyncBatchNorm2d(4)
        nn.init.uniform_(other.weight)
        ours.load_state_dict(other.state_dict())
        assert torch.equal(ours.weight, other.weight)
        other.load_state_dict(ours.state_dict())


def test_import_brings_no_plotting_command_line_or_accelerate():
    heavy = ["matplotlib", "click", "rich", "sklearn", "accelerate", "jinja2", "pytest", "torch._dynamo"]
    heavy += ["syncnorm.testing"]
    code = f"import sys, syncnorm; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    already = subprocess.run(
        [sys.executable, "-c", f"import sys, torch; print([m for m in {heavy} if m in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout == already.stdout


def test_import_takes_at_most_a_fifth_of_torchs_own():
    code = (
        "import time; start = time.perf_counter(); import torch; between = time.perf_counter(); import syncnorm; "
        "print((time.perf_counter() - start) / (between - start))"
    )
    ratios = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert statistics.median(ratios) < 1.2


@pytest.mark.parametrize(
    "name",
    [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "syncnorm.") if not m.name.endswith("__main__")],
)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn}, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0


COLLECTIVES = {
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "broadcast", "reduce", "gather",
    "scatter", "reduce_scatter", "all_to_all", "send", "recv", "isend", "irecv",
}  # fmt: skip


def test_only_comm_communicates_tensors():
    core = [f for f in FILES if f.parent == PACKAGE or f.is_relative_to(PACKAGE / "layer")]
    core += [f for f in FILES if f.is_relative_to(PACKAGE / "conversion")]
    assert len(core) > 20
    for file in core:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist":
                assert node.attr not in COLLECTIVES, f"{file}:{node.lineno}"


@pytest.mark.parametrize("part", ["layer/moments.py", "layer/kernels", "conversion/baselines.py", "tools/report"])
def test_pure_parts_know_no_torch_distributed(part):
    files = [file for file in FILES if file.is_relative_to(PACKAGE / part)]
    assert files
    for file in files:
        imports = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not any("distributed" in ast.unparse(n) for n in imports), file


def test_torch_sync_batch_norm_is_not_a_parent():
    """DDP refuses its instances on a CPU, subclasses too."""
    assert not issubclass(syncnorm.SyncBatchNorm, nn.SyncBatchNorm)


class TestDataParallel:
    """nn.DataParallel cannot be synced, and says so at the first forward."""

    model = staticmethod(lambda: syncnorm.convert(nn.Sequential(nn.BatchNorm2d(3))))

    def test_warning_at_the_first_forward(self, recwarn):
        model = nn.DataParallel(self.model())
        x = torch.randn(2, 3, 4, 4)
        with pytest.warns(UserWarning, match=r"inside nn.DataParallel, whose replicas, .* cannot be synchronized"):
            model(x)
        recwarn.clear()
        model(x)
        assert not recwarn

    def test_replica_is_local_and_warns(self):
        replica = self.model()[0]._replicate_for_data_parallel()
        replica.weight, replica.bias = torch.ones(3), torch.zeros(3)
        with pytest.warns(UserWarning, match="Use DistributedDataParallel"):
            replica(torch.randn(2, 3, 4, 4))

    def test_no_warning_elsewhere(self, recwarn):
        self.model()(torch.randn(2, 3, 4, 4))
        assert not recwarn
