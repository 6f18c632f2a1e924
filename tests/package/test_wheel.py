"""The wheel and the sdist that are published, as ``python -m build`` makes them."""

import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import syncnorm

ROOT = Path(__file__).parents[2]
# Easily left out of a wheel.
NOT_CODE = {
    "syncnorm/py.typed",
    *(f"syncnorm/native/{name}.c" for name in ("library", "merge", "passes")),
    *(f"syncnorm/tools/report/templates/{name}" for name in ("comparison.html.j2", "page.css", "page.js")),
}

LIBRARY = "syncnorm/native/syncnorm.native.so"  # compiled with the wheel, and in a checkout perhaps

if find_spec("build") is None or find_spec("hatchling") is None:
    pytest.skip("needs build and hatchling: pip install '.[release]'", allow_module_level=True)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # Without isolation, nothing is downloaded. The wheel is built from the sdist, so the sdist is complete.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def sources() -> set[str]:
    files = (path for path in ROOT.glob("syncnorm/**/*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files} - {LIBRARY}


def test_the_wheel_contains_the_package_its_library_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")  # for every Python, whatever torch it has
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == sources() | {LIBRARY} >= NOT_CODE
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
    assert any(name.endswith("/entry_points.txt") for name in metadata)


def test_the_library_of_the_wheel_is_used(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "from syncnorm import native; print(native.library is not None, native.absent, native.__file__)"
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["True", str(tmp_path / "syncnorm/native/__init__.py")], done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="wheels for Linux")
def test_the_wheel_runs_on_every_linux_that_torch_supports(built):
    """PyPI accepts it with the tag of a manylinux platform, which auditwheel writes into it after this check."""
    if find_spec("auditwheel") is None:
        pytest.skip("needs auditwheel: pip install '.[release]'")
    (wheel,) = built.glob("*.whl")
    done = subprocess.run([sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True)
    (version,) = set(re.findall(r'"manylinux_2_(\d+)_', done.stdout)) or {""}
    assert done.returncode == 0, done.stderr
    assert int(version) <= 28, done.stdout  # torch's own wheels are manylinux_2_28


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment that has all packages of this one but syncnorm, which is a folder or a checkout here."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A folder that a .pth file names is searched, but .pth files inside of it, as that of a checkout, are not read.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others))
    return folder


def run(folder: Path, *command: str) -> str:
    """The output of a program of the environment, outside of the checkout."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    program, *arguments = command
    done = subprocess.run(
        [folder / "bin" / program, *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# The whole self-test takes too long here; the workflow of a release runs it.
TWO_RANKS = """
import torch
from torch import nn
import syncnorm
import syncnorm.native
from syncnorm.testing import assert_matches_single_process

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

if __name__ == "__main__":
    assert_matches_single_process(build, torch.randn(7, 3, 6, 6), splits=[5, 2])
    print(syncnorm.__file__, syncnorm.__version__, syncnorm.native.library is not None)
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["*.tar.gz", "*.whl"])
def test_installed_in_an_environment_the_command_and_two_ranks_work(built, environment, kind):
    (archive,) = built.glob(kind)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "--force-reinstall"]
    # Neither an index nor a build environment: nothing is downloaded.
    command = [*pip, "-q", "--no-deps", "--no-index", "--no-build-isolation", "--no-compile", str(archive)]
    done = subprocess.run(command, cwd=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"syncnorm: {syncnorm.__version__}\nnative code: yes" in run(environment, "syncnorm", "env")
    (environment / "two_ranks.py").write_text(TWO_RANKS)
    file, *facts = run(environment, "python", "two_ranks.py").split()
    assert Path(file).is_relative_to(environment)
    assert facts == [syncnorm.__version__, "True"]


def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(unpacked)]
    no_compiler = {"PATH": str(Path(sys.executable).parent)}
    done = subprocess.run(command, env=os.environ | no_compiler, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("no C compiler (cc, gcc or clang) was found") == 1
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == sources()


def test_the_sdist_contains_what_builds_and_tests_it(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= sources() >= NOT_CODE
    assert names >= {
        "pyproject.toml",
        "hatch_build.py",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "RELEASING.md",
        "SECURITY.md",
        "constraints.txt",
        "examples/tour.ipynb",
        "launch/test.sh",
    }
    assert names >= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py")}
    junk = (".ci/", ".cache/", ".venv/", "__pycache__", ".pyc", ".pt", ".so", "build/", "dist/")
    assert not [name for name in names if any(part in name for part in junk)]


def test_the_metadata_names_versions_and_addresses(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == syncnorm.__version__
    assert metadata["Author"] == "The syncnorm developers"
    assert metadata["License-Expression"] == "BSD-3-Clause"
    addresses = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert addresses.keys() == {"Documentation", "Source", "Issues", "Changelog"}
    pythons = [line.rpartition(" ")[2] for line in metadata.get_all("Classifier") if "Python :: 3." in line]
    assert pythons == ["3.10", "3.11", "3.12", "3.13"]
    cited = re.findall("^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == [syncnorm.__version__]


def test_an_index_accepts_the_metadata(built):
    if find_spec("twine") is None:
        pytest.skip("needs twine: pip install '.[release]'")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
