"""launch/slurm.sbatch under a Slurm that the tests start on this machine: munged, slurmctld and slurmd."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from launches import ROOT, TRAIN, environment, epochs, run

pytestmark = [pytest.mark.slow, pytest.mark.root, pytest.mark.timeout(400)]  # a quiet machine needs 20 s

CONFIGURATION = """
ClusterName=syncnorm
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
ReturnToService=2
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cores}
PartitionName=all Nodes=ALL Default=YES State=UP OverSubscribe=FORCE:4
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which sbatch finds the cluster."""
    absent = [tool for tool in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(tool, path=PATH)]
    if absent:
        pytest.skip(f"needs Slurm; absent: {', '.join(absent)}")
    home = tmp_path_factory.mktemp("slurm")
    (home / "state").mkdir()
    (home / "munge.key").write_bytes(os.urandom(1024))
    (home / "munge.key").chmod(0o400)
    ports = dict(zip(("controller_port", "node_port"), free_ports(), strict=True))
    (home / "slurm.conf").write_text(CONFIGURATION.format(home=home, cores=os.cpu_count(), **ports))
    (home / "cgroup.conf").write_text("CgroupAutomount=no\n")
    env = environment(SLURM_CONF=str(home / "slurm.conf"), GLOO_SOCKET_IFNAME="lo")

    munge = [
        f"--{what}={home}/munge.{what.split('-')[0]}" for what in ("socket", "key-file", "pid-file", "seed-file")
    ]
    with ExitStack() as running:
        for command in (
            ["munged", "--force", "--foreground", *munge],
            ["slurmctld", "-D", "-f", f"{home}/slurm.conf"],
            ["slurmd", "-D", "-N", "localhost", "-f", f"{home}/slurm.conf"],
        ):
            log = running.enter_context((home / f"{command[0]}.log").open("w"))
            daemon = subprocess.Popen(command, env=env, stdout=log, stderr=log)
            running.callback(daemon.wait, 20)
            running.callback(daemon.terminate)
            wait_until(lambda: (home / "munge.socket").exists(), home)
        wait_until(lambda: "idle" in subprocess.run(["sinfo"], env=env, capture_output=True, text=True).stdout, home)
        yield env


PATH = environment()["PATH"]


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("", 0))
        other.bind(("", 0))
        return one.getsockname()[1], other.getsockname()[1]


def wait_until(condition, home: Path) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(file.read_text()[-1000:] for file in home.glob("*.log"))
            pytest.skip(f"Slurm does not run here: {logs}")
        time.sleep(0.2)


def sbatch(env: dict[str, str], output: Path, *command: str) -> int:
    recipe = str(ROOT / "launch" / "slurm.sbatch")
    options = "--wait", "--ntasks", "2", "--overcommit", "--no-requeue", "--output", str(output)
    return subprocess.run(["sbatch", *options, recipe, *command], env=env, cwd=output.parent).returncode


def test_slurm_trains_as_torchrun_does(slurm, tmp_path):
    output = tmp_path / "job.out"
    script = *TRAIN, "--epochs", "1", "--checkpoint"
    assert sbatch(slurm, output, *script, "slurm.pt") == 0, output.read_text()
    expected = run("bash", str(ROOT / "launch" / "torchrun.sh"), *script, "torchrun.pt", cwd=tmp_path, RANKS="2")
    assert epochs(output.read_text()) == epochs(expected) != []
    assert [ranks for _, ranks, _ in epochs(expected)] == [2]


def test_slurm_ends_a_job_with_its_error(slurm, tmp_path):
    output = tmp_path / "job.out"
    assert sbatch(slurm, output, TRAIN[0], "--global-batch", "3") != 0
    assert "--global-batch 3 does not divide among 2 ranks" in output.read_text()
