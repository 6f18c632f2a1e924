"""The wheel and the sdist that are published, as ``python -m build`` makes them."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

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
        "constraints.txt",
        "launch/test.sh",
    }
    assert names >= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py")}
    junk = (".ci/", ".cache/", ".venv/", "__pycache__", ".pyc", ".pt", ".so", "build/", "dist/")
    assert not [name for name in names if any(part in name for part in junk)]


def test_an_index_accepts_the_metadata(built):
    if find_spec("twine") is None:
        pytest.skip("needs twine: pip install '.[release]'")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
