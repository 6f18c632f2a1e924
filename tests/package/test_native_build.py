"""The C library: compiled from its sources, used only if it was made of them, and never the cause of an error."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import syncnorm.native
from syncnorm.native.build import COMMAND, build, compiler

FOLDER = Path(syncnorm.native.__file__).parent
LOAD = "from syncnorm import native; print(native.library is not None, native.instruction_set); print(native.absent)"

needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C compiler")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The folder of the C files, in a package that has nothing else; without a library."""
    (tmp_path / "syncnorm").mkdir()
    (tmp_path / "syncnorm/__init__.py").touch()
    shutil.copytree(FOLDER, tmp_path / "syncnorm/native", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path / "syncnorm/native"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of these sources."""
    folder = tmp_path_factory.mktemp("compiled")
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"), dirs_exist_ok=True)
    assert build(folder) is None
    return folder / "syncnorm.native.so"


def loaded(copy: Path, **variables: str) -> tuple[bool, str, str]:
    """Whether a new process has the library, the instruction set, and why it has none."""
    environ = {k: v for k, v in os.environ.items() if k != "SYNCNORM_NATIVE"} | {"PYTHONPATH": str(copy.parents[1])}
    command = [sys.executable, "-c", LOAD]
    done = subprocess.run(command, env=environ | variables, cwd=copy, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    first, absent = done.stdout.splitlines()
    there, _, instruction_set = first.partition(" ")
    return there == "True", instruction_set, absent


@needs_compiler
def test_compiled_in_place_by_the_command_that_the_reason_names(copy):
    there, _, absent = loaded(copy)
    assert not there
    assert absent == f"not compiled: with a C compiler, run {COMMAND} or pip install syncnorm again"
    environ = os.environ | {"PYTHONPATH": str(copy.parents[1])}
    command = [sys.executable, *COMMAND.split()[1:]]
    done = subprocess.run(command, env=environ, cwd=copy, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    there, instruction_set, absent = loaded(copy)
    assert (there, absent) == (True, "")
    assert instruction_set in ("baseline", "v3")


@needs_compiler
def test_turned_off_by_a_variable(copy, library):
    shutil.copy(library, copy)
    assert loaded(copy)[0]
    assert loaded(copy, SYNCNORM_NATIVE="0") == (False, "", "turned off by SYNCNORM_NATIVE=0")


@needs_compiler
@pytest.mark.parametrize("changed", ["merge.c", "build.py"])
def test_a_library_of_other_sources_is_not_used(copy, library, changed):
    shutil.copy(library, copy)
    with (copy / changed).open("a") as file:
        file.write("\n")
    there, _, absent = loaded(copy)
    assert not there
    assert absent == f"outdated, its sources have changed: run {COMMAND} or pip install syncnorm again"


def test_a_damaged_library_is_not_used(copy):
    (copy / "syncnorm.native.so").write_bytes(b"no library")
    there, _, absent = loaded(copy)
    assert not there
    assert "syncnorm.native.so" in absent


def test_without_a_compiler_the_reason_is_said(copy, monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert build(copy) == "no C compiler (/nowhere/cc) was found"
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(copy))
    assert build(copy) == "no C compiler (cc, gcc or clang) was found"
    assert not (copy / "syncnorm.native.so").exists()


@needs_compiler
def test_what_the_compiler_says_is_repeated(copy):
    (copy / "merge.c").write_text("int merge(")
    reason = build(copy)
    assert reason is not None
    assert "merge.c" in reason
    assert "error" in reason


@needs_compiler
def test_a_compiler_without_x86_64_v3_makes_the_baseline(copy, tmp_path, monkeypatch):
    old = tmp_path / "old-cc"
    old.write_text(f'#!/bin/sh\ncase "$*" in *-march=*) exit 1;; esac\nexec {" ".join(compiler())} "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("CC", str(old))
    assert build(copy) is None
    assert loaded(copy) == (True, "baseline", "")


@pytest.mark.parametrize("command", ["true", "false", "'", " ", "/etc/passwd", "/tmp"])
def test_whatever_cc_is_installation_goes_on_without_the_library(copy, monkeypatch, command):
    monkeypatch.setenv("CC", command)
    reason = build(copy)
    assert isinstance(reason, str)
    assert reason
    assert not list(copy.glob("*.so"))
