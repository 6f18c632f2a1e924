"""The wheel and the sdist that are published, as ``python -m build`` makes them."""

import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Easily left out of a wheel.
NOT_CODE = {
    "syncnorm/py.typed",
    *(f"syncnorm/tools/report/templates/{name}" for name in ("comparison.html.j2", "page.css", "page.js")),
}

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
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_the_wheel_contains_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == sources() >= NOT_CODE
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
    assert any(name.endswith("/entry_points.txt") for name in metadata)


def test_the_sdist_contains_what_builds_and_tests_it(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= sources() >= NOT_CODE
    assert names >= {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "launch/test.sh"}
    assert names >= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py")}
    junk = (".ci/", ".cache/", ".venv/", "__pycache__", ".pyc", ".pt", "build/", "dist/")
    assert not [name for name in names if any(part in name for part in junk)]


def test_an_index_accepts_the_metadata(built):
    if find_spec("twine") is None:
        pytest.skip("needs twine: pip install '.[release]'")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
