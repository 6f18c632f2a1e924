"""Rules of the architecture that the import contracts in pyproject.toml cannot express."""

import ast
from pathlib import Path

import pytest

import syncnorm

PACKAGE = Path(syncnorm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

COLLECTIVES = {
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "broadcast", "reduce", "gather",
    "scatter", "reduce_scatter", "all_to_all", "send", "recv", "isend", "irecv",
}  # fmt: skip


def test_only_comm_communicates_tensors():
    parts = PACKAGE / "layer", PACKAGE / "conversion"
    core = [f for f in FILES if f.parent == PACKAGE or any(f.is_relative_to(part) for part in parts)]
    core.remove(PACKAGE / "_torch_versions.py")  # gives a collective one name, and calls none
    assert len(core) > 20
    for file in core:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist":
                assert node.attr not in COLLECTIVES, f"{file}:{node.lineno}"


@pytest.mark.parametrize("part", ["layer/moments.py", "layer/kernels", "conversion/baselines.py", "tools/report"])
def test_pure_parts_do_not_import_torch_distributed(part):
    files = [file for file in FILES if file.is_relative_to(PACKAGE / part)]
    assert files
    for file in files:
        imports = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not any("distributed" in ast.unparse(n) for n in imports), file
