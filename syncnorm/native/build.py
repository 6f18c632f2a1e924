"""Compiles the C files of this folder into one shared library in the same folder.

It is C11 without headers of torch or Python, so one library serves all versions of both. The standard library is all
that this file needs, because it runs before syncnorm is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "syncnorm.native.so"  # the dot keeps pkgutil from taking it for a module
COMMAND = "python -m syncnorm.native"

_COMMON = ["-std=gnu11", "-O3", "-fPIC", "-fvisibility=default"]
# NaN and infinity keep their meaning; only floating-point exceptions and errno, which nobody reads, are given up.
_LOOPS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
_FLAGS = {
    "merge.c": [*_LOOPS, "-ffp-contract=off"],  # the same bits on every CPU
}
# The passes are compiled for each of these, and the best one that the CPU supports is called.
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["v3"] = ["-march=x86-64-v3"]  # AVX2 and FMA


def sources_hash(folder: Path = FOLDER) -> str:
    """A hash of the C files and of this one, which the library contains, so that an outdated library is noticed."""
    digest = hashlib.sha256()
    for file in [Path(__file__), *sorted(folder.glob("*.c"))]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> list[str] | None:
    """The command of ``$CC``, else the first of cc, gcc and clang; None if there is none."""
    if os.environ.get("CC"):
        try:
            command = shlex.split(os.environ["CC"])
        except ValueError:  # a quotation mark without another one
            return None
        return command if command and shutil.which(command[0]) else None
    found = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    return None if found is None else [found]


def build(folder: Path = FOLDER) -> str | None:
    """Compiles the library into ``folder``, in place of the old one.

    Returns:
        None, or why there is no new library.
    """
    library = folder / LIBRARY.name
    command = compiler()
    if os.name != "posix" or command is None:
        return f"no C compiler ({os.environ.get('CC') or 'cc, gcc or clang'}) was found"
    with tempfile.TemporaryDirectory() as temporary:
        objects = []
        try:
            for source in sorted(folder.glob("*.c")):
                objects += _compile(command, source, Path(temporary), sources_hash(folder))
            linked = Path(temporary, library.name)
            _run([*command, "-shared", *objects, "-lm", "-o", str(linked)])
            # Not over a file that a running process has mapped, but in its place.
            partial = library.with_suffix(f".{os.getpid()}")
            shutil.copy(linked, partial)
            partial.replace(library)
        except subprocess.CalledProcessError as error:
            return f"{shlex.join(error.cmd)} failed: {(error.stderr.strip() or str(error)).splitlines()[0]}"
        except OSError as error:  # a compiler that does not run or writes nothing, a folder that cannot be written to
            return f"{shlex.join(command)} made no library: {error}"
    return None


def _compile(command: list[str], source: Path, folder: Path, hashed: str) -> list[str]:
    """The object files of one source: of the passes one for each instruction set that the compiler knows."""
    variants = INSTRUCTION_SETS if source.name == "passes.c" else {"": []}
    objects = []
    for name, extra in variants.items():
        made = folder / f"{source.stem}{name}.o"
        flags = [*_COMMON, *_FLAGS.get(source.name, _LOOPS), *extra, f"-DISA={name}", f'-DSOURCES="{hashed}"']
        try:
            _run([*command, *flags, "-c", str(source), "-o", str(made)])
        except subprocess.CalledProcessError:
            if not extra:
                raise
            continue  # an older compiler: there is the baseline
        objects.append(str(made))
    return objects


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
