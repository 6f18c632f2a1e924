"""The core tests with other versions of torch and Python, and the checks that CI runs: ``nox -s core-2.6``.

torch comes from the index of pip. On Linux PyPI's wheels bring CUDA, 3 GB of it; the CPU builds are enough here::

    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu nox -s core-2.8

Arguments after ``--`` go to pytest.
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "core-2.6"]

# What a version of torch can change: the layer and what surrounds it, without the tools and the launchers.
CORE = [f"tests/{name}" for name in ("comm", "conversion", "layer", "monitor", "testing", "training")]
TEST_PACKAGES = ["pytest>=8", "pytest-xdist>=3.5", "pytest-timeout>=2.3", "hypothesis>=6.100"]

# name -> Python and torch. Each Python runs with one end of the range of torch, each torch with one Python.
VERSIONS = {
    "core-2.6": ("3.11", ["torch==2.6.0", "numpy<2"]),  # the oldest torch promised, and the oldest numpy
    **{f"core-{minor}": ("3.11", [f"torch=={minor}.*"]) for minor in ("2.7", "2.8", "2.9", "2.10", "2.11", "2.12")},
    "newest": ("3.11", ["torch"]),
    "py310": ("3.10", ["torch==2.6.0"]),
    "py312": ("3.12", ["torch"]),
    "py313": ("3.13", ["torch"]),
}


def core(session: nox.Session, packages: list[str]) -> None:
    """Runs the core tests with ``packages``."""
    session.install(*packages)
    session.install("-e", ".[compare]", *packages, *TEST_PACKAGES)
    session.run(
        "python", "-m", "pytest", "-n", "auto", "--dist", "worksteal", "-m", "not slow", *CORE, *session.posargs
    )


for _name, (_python, _packages) in VERSIONS.items():

    @nox.session(name=_name, python=_python)
    def _core(session: nox.Session, packages: list[str] = _packages) -> None:
        core(session, packages)


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Style, types and the import contracts, with the pinned versions."""
    session.install("-c", "constraints.txt", "torch")
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports", "--no-logo")


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """The site, of which every link must lead somewhere."""
    session.install("-c", "constraints.txt", "torch")
    session.install("-c", "constraints.txt", "-e", ".[docs]")
    session.run("mkdocs", "build", "--strict")
