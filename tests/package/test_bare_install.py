"""The layer works with the packages that ``pip install syncnorm`` brings without an extra, on gloo ranks as well."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import torch
from torch import nn

import syncnorm
from syncnorm.testing import assert_matches_single_process


def build_model():
    return syncnorm.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))


if __name__ == "__main__":
    assert_matches_single_process(build_model, torch.randn(7, 3, 6, 6), splits=[5, 2])
    print(*syncnorm.describe(syncnorm.revert(build_model())))
"""


def dependencies() -> set[str]:
    """The names in pyproject.toml that every installation has."""
    (listed,) = re.findall(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return set(re.findall(r'"([\w-]+)', listed))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``PYTHONPATH`` with this checkout's package and its dependencies, theirs included."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "syncnorm").symlink_to(ROOT / "syncnorm")
    waiting, seen = dependencies(), set[str]()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # of another platform
            continue
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
        required = {re.match(r"[\w.-]+", text)[0] for text in found.requires or () if "extra ==" not in text}
        waiting |= required - seen
    return folder


def run(bare: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python without any other installed package: ``-S`` leaves out site-packages, for the ranks too."""
    path = {"PYTHONPATH": str(bare), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=bare, env=os.environ | path, capture_output=True, text=True)


def test_torch_is_the_only_dependency():
    assert dependencies() == {"torch"}


@pytest.mark.slow
def test_convert_train_on_two_ranks_and_revert(bare):
    (bare / "program.py").write_text(PROGRAM)
    done = run(bare, "program.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("BatchNorm2d") == 1


def test_the_tools_name_the_extra_that_they_need(bare):
    done = run(bare, "-m", "syncnorm", "env")
    said = done.stderr.splitlines()[-1]  # after torch's warning that there is no NumPy
    assert (done.returncode, said) == (2, 'syncnorm: needs click: pip install "syncnorm[compare]"')
    done = run(bare, "-c", "import syncnorm; syncnorm.compare")
    assert done.stderr.endswith('syncnorm.compare needs accelerate: pip install "syncnorm[cli]"\n')


@pytest.mark.parametrize(
    ("used", "package", "user"),
    [
        ("lightning", "lightning", "lightning"),
        ("huggingface", "transformers", "huggingface"),
        ("scalars.to_mlflow()", "mlflow", "scalars.to_mlflow"),
    ],
)
def test_an_integration_names_the_package_that_it_needs(bare, used, package, user):
    done = run(bare, "-c", f"import syncnorm; syncnorm.integrations.{used}")
    said = done.stderr.splitlines()[-1]
    assert said == f"ModuleNotFoundError: syncnorm.integrations.{user} needs {package}: pip install {package}"


def test_everything_that_the_package_exports_can_be_imported(bare):
    done = run(bare, "-c", "from syncnorm import *; print(convert.__name__, testing.__name__)")
    assert done.stdout == "convert syncnorm.testing\n", done.stderr
