"""Recipes for several machines, on two network namespaces joined by a virtual cable."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launches import ROOT, SUPPORT, TRAIN, environment, epochs, run

FIRST, SECOND = "10.213.7.1", "10.213.7.2"
PATIENCE_S = 200  # a quiet machine needs a tenth of it

pytestmark = [
    pytest.mark.slow,
    pytest.mark.root,
    pytest.mark.timeout(2 * PATIENCE_S),
]


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Node:
    """A network namespace with an address, and the process that runs in it."""

    def __init__(self, name: str, address: str, logs: Path) -> None:
        self.name, self.address, self.out, self.err = name, address, logs / f"{name}.out", logs / f"{name}.err"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str, **env: str) -> None:
        ours = environment(**env)
        ours.pop("GLOO_SOCKET_IFNAME", None)  # the recipe finds it
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                stdout=out,
                stderr=err,
                cwd=self.out.parent,
                env=ours | env,
            )

    def torchrun(self, *command: str, **env: str) -> None:
        recipe = str(ROOT / "launch" / "torchrun_nodes.sh")
        self.start("bash", recipe, *command, FIRST=FIRST, RANKS="1", **env)

    def wait_for(self, text: str, file: str = "out") -> None:
        deadline = time.monotonic() + PATIENCE_S
        assert self.process is not None
        while True:
            ended = self.process.poll() is not None or time.monotonic() > deadline
            if text in getattr(self, file).read_text():
                return
            assert not ended, f"{self.name} never said {text!r}: {self.err.read_text()}"
            time.sleep(0.02)

    def end(self, timeout: float = PATIENCE_S) -> int:
        assert self.process is not None
        return self.process.wait(timeout)

    def kill(self) -> None:
        for pid in ip("netns", "pids", self.name).split():
            os.kill(int(pid), signal.SIGKILL)
        if self.process is not None:
            self.process.wait(10)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    pair = Node(f"syncnorm-{os.getpid()}-a", FIRST, tmp_path), Node(f"syncnorm-{os.getpid()}-b", SECOND, tmp_path)
    try:
        for node in pair:
            ip("netns", "add", node.name)
            ip("netns", "exec", node.name, "true")
        ip(
            "link",
            "add",
            "cable",
            "netns",
            pair[0].name,
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            pair[1].name,
        )
        for node in pair:
            ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "cable")
            for interface in ("lo", "cable"):
                ip("-n", node.name, "link", "set", interface, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for node in pair:
            subprocess.run(["ip", "netns", "delete", node.name], capture_output=True)
        pytest.skip(f"no network namespaces here: {error}")
    yield pair
    for node in pair:
        node.kill()
        ip("netns", "delete", node.name)


def test_a_cut_cable_ends_both_nodes_with_an_error_that_names_the_layer(nodes):
    script = str(SUPPORT / "launched.py")
    for node in nodes:
        # Network namespaces are one host, whose ranks would share memory and not notice the cable.
        variables = {"NODES": "2", "RESTARTS": "0", "SYNCNORM_TRANSPORT": "gloo"}
        node.torchrun(script, "--timeout", "4", "--seconds", "200", **variables)
    for rank, node in enumerate(nodes):  # ranks follow addresses
        node.wait_for(f"rank {rank} of 2 agrees with the whole batch")
    ip("-n", nodes[0].name, "link", "set", "cable", "down")
    for rank, node in enumerate(nodes):
        node.wait_for(f"SyncNormError: rank {rank}: ", "err")
        assert re.search(rf"SyncNormError: rank {rank}: (forward|backward) of stem", node.err.read_text())
    assert nodes[0].end() == 1
    # On the second node, only the rank ends: torchrun's agent there waits for the first node until TCP gives up.
    deadline = time.monotonic() + PATIENCE_S
    while len(ip("netns", "pids", nodes[1].name).split()) > 1:
        assert time.monotonic() < deadline, "the rank of the second node goes on"
        time.sleep(0.1)


def test_ranks_of_each_node_share_memory(nodes):
    """Network namespaces alone do not tell hosts apart: ranks in both could open each other's files in /proc. A
    process namespace for each node, with a /proc of its own, hides them, as it does between containers.
    """
    container = "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"
    recipe = "bash", str(ROOT / "launch" / "torchrun_nodes.sh")
    for node in nodes:
        node.start(
            *container, *recipe, str(SUPPORT / "two_hosts.py"), FIRST=FIRST, RANKS="2", NODES="2", RESTARTS="0"
        )
    for node in nodes:
        assert node.end() == 0, node.err.read_text()
    printed = sorted(line for node in nodes for line in node.out.read_text().splitlines() if "rank" in line)
    found = "auto: shared memory on 2 hosts (2 + 2 ranks), gloo between them"
    assert printed == [f"rank {rank}: {found}" for rank in range(4)]


def test_an_elastic_job_that_loses_a_node_takes_the_same_steps(nodes, tmp_path):
    script = str(SUPPORT / "in_double.py"), *TRAIN, "--epochs", "6", "--checkpoint"
    for node in nodes:
        node.torchrun(*script, "shared.pt")
    nodes[0].wait_for("epoch 0, 2 ranks")
    nodes[1].kill()
    undisturbed = run("bash", str(ROOT / "launch" / "torchrun.sh"), *script, "alone.pt", cwd=tmp_path, RANKS="2")
    assert nodes[0].end() == 0, nodes[0].err.read_text()

    seen, expected = epochs(nodes[0].out.read_text()), epochs(undisturbed)
    assert [epoch for epoch, _, _ in seen] == list(range(6))  # no epoch is skipped or repeated
    assert (seen[0][1], seen[-1][1]) == (2, 1)  # ranks
    assert [loss for _, _, loss in seen] == pytest.approx([loss for _, _, loss in expected], abs=2e-6)


def test_accelerate_on_two_machines(nodes):
    config = str(ROOT / "launch" / "accelerate" / "machines.yaml")
    for rank, node in enumerate(nodes):
        machines = "--config_file", config, "--machine_rank", str(rank), "--main_process_ip", FIRST
        launch = sys.executable, "-m", "accelerate.commands.launch", *machines
        train = str(ROOT / "examples" / "train_launched.py"), "--epochs", "1"
        node.start(*launch, *train, GLOO_SOCKET_IFNAME="cable")
    for node in nodes:
        assert node.end() == 0, node.err.read_text()
    assert nodes[0].out.read_text().startswith("2 ranks, ")
