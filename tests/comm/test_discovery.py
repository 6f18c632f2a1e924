"""Which ranks share memory is found out: where their files are, what happens without room for one, what is left."""

import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hosts import on_hosts

import syncnorm
from syncnorm import comm
from syncnorm.comm.transports import discovery
from syncnorm.testing import run_ranks


def transport() -> str:
    """How the ranks of a new group travel, after a forward whose result is checked."""
    group = dist.new_group()
    layer = syncnorm.SyncBatchNorm(4, process_group=group, momentum=1.0)
    layer(torch.full((2, 4), float(dist.get_rank())))
    torch.testing.assert_close(layer.running_mean, torch.full((4,), (dist.get_world_size() - 1) / 2))
    return comm.transport_of(group).removeprefix("auto: ")


def open_files() -> set[int]:
    """The files of ranks that this process has open, by their inodes."""
    ours = re.compile("memfd:syncnorm|/syncnorm-(?!ranks)")
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return {link.stat().st_ino for link in links if ours.search(os.readlink(link))}


def without_memfd(stack: ExitStack) -> list[str]:
    """Takes memfd_create away; the paths of the files that this rank makes instead."""
    paths: list[str] = []
    real = discovery.create_file

    def create_file(token: str) -> tuple[int, str]:
        descriptor, path = real(token)
        paths.append(path)
        return descriptor, path

    stack.enter_context(mock.patch.object(os, "memfd_create", side_effect=OSError("not permitted"), create=True))
    stack.enter_context(mock.patch.object(discovery, "create_file", create_file))
    return paths


def _rank_has_no_memfd(dev_shm: bool, folder: str) -> tuple[str, str, bool]:
    with ExitStack() as stack:
        paths = without_memfd(stack)
        stack.enter_context(mock.patch.object(tempfile, "tempdir", folder))
        if not dev_shm:
            mkstemp = tempfile.mkstemp

            def elsewhere(**options: str) -> tuple[int, str]:
                if options.get("dir") == "/dev/shm":
                    raise FileNotFoundError("/dev/shm")
                return mkstemp(**options)

            stack.enter_context(mock.patch.object(tempfile, "mkstemp", elsewhere))
        found = transport()
        return found, os.path.dirname(paths[0]), os.path.exists(paths[0])


@pytest.mark.parametrize("dev_shm", [True, False])
def test_without_memfd_the_file_has_a_name_for_a_moment(dev_shm, tmp_path):
    folder = "/dev/shm" if dev_shm else str(tmp_path)
    expected = ("shared memory, 2 ranks of one host", folder, False)
    assert run_ranks(_rank_has_no_memfd, args=(dev_shm, str(tmp_path))) == [expected, expected]
    assert not list(tmp_path.iterdir())


def _rank_has_a_small_file_system(folder: str) -> tuple[str, int]:
    file = tempfile.mkstemp(prefix="syncnorm-", dir=folder)
    with mock.patch.object(discovery, "create_file", return_value=file):
        return transport(), len(open_files())


@pytest.mark.root
@pytest.mark.parametrize("full", [False, True])  # the file system has room for the file's first bytes, or for nothing
def test_a_file_system_without_room_means_gloo(full, tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr}")
    try:
        if full:
            with pytest.raises(OSError, match="No space left"):
                (tmp_path / "filler").write_bytes(bytes(2**17))
        assert run_ranks(_rank_has_a_small_file_system, args=(str(tmp_path),)) == [("gloo, 2 ranks", 0)] * 2
        assert [path.name for path in tmp_path.iterdir()] == ["filler"] * full
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def _rank_reads_a_wrong_token() -> tuple[str, int]:
    """Rank 1 finds a file where rank 0 has its own, but with another token, as in another container."""
    real, calls = discovery._gather_notes, []

    def gather_notes(connections: object, note: str, world_size: int) -> list[str]:
        notes = real(connections, note, world_size)
        calls.append(note)
        if len(calls) == 1 and dist.get_rank() == 1:
            notes[0] = "x" * discovery.TOKEN_BYTES + notes[0][discovery.TOKEN_BYTES :]
        return notes

    with mock.patch.object(discovery, "_gather_notes", gather_notes):
        return transport(), len(open_files())


def test_a_file_with_another_token_is_not_shared():
    for found, files in run_ranks(_rank_reads_a_wrong_token, 2):
        assert found == "gloo, 2 ranks"
        assert files == 0  # neither the own file nor the other one is kept
    for found, files in run_ranks(_rank_reads_a_wrong_token, 3):
        assert found == "shared memory on 2 hosts (2 + 1 ranks), gloo between them"
        assert files == 1


def _ranks_see_one_direction(name: str) -> tuple[str, int]:
    """Rank 1 sees rank 0, and rank 2 sees rank 1 but not rank 0."""
    os.environ["SYNCNORM_TRANSPORT"] = name
    with on_hosts([[0, 1], [1, 2]] if dist.get_rank() < 2 else [[1, 2]]):
        try:
            return transport(), len(open_files())
        except syncnorm.SyncNormError as error:
            return str(error), len(open_files())


def test_visibility_in_one_direction_means_gloo():
    assert run_ranks(_ranks_see_one_direction, 3, ("auto",)) == [("gloo, 3 ranks", 0)] * 3
    for error, files in run_ranks(_ranks_see_one_direction, 3, ("shm",)):
        assert "ranks cannot share memory: ranks see one another's files in one direction only" in error
        assert files == 0


KILLED = """
import os, random, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
import torch._dynamo  # before torch 2.13 the first forward imports it, which takes a second
import syncnorm

def rank_process(rank, store, ready):
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    os.write(ready, b"x")
    while True:  # ranks connect again and again
        group = dist.new_group()
        layer = syncnorm.SyncBatchNorm(4, process_group=group)
        for _ in range(20):
            layer(torch.randn(3, 4, requires_grad=True)).sum().backward()
        dist.destroy_process_group(group)

def has_a_file(pid):
    return any("memfd:syncnorm" in os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))

seen = []
for attempt in range(8):
    reading, writing = os.pipe()
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            rank_process(rank, f"{sys.argv[1]}/store{attempt}", writing)
        pids.append(pid)
    for _ in pids:
        assert os.read(reading, 1)
    time.sleep(random.Random(attempt).uniform(0, 0.3))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    seen.append(has_a_file(pids[0]))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
print(sum(seen))
"""


def test_killed_ranks_leave_nothing_behind(tmp_path):
    """At random moments, while they connect and later."""
    stores, temporary = tmp_path / "stores", tmp_path / "temporary"
    stores.mkdir()
    temporary.mkdir()
    before = set(os.listdir("/dev/shm"))
    environ = os.environ | {"TMPDIR": str(temporary), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(stores)], env=environ, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.splitlines()[-1]) > 2  # ranks that had a file when they were killed
    assert not [name for name in os.listdir("/dev/shm") if name not in before and "syncnorm" in name]
    assert not list(temporary.glob("*syncnorm*"))


def test_a_file_of_another_group_is_not_even_opened():
    """Closing it would release this process's lock on it."""
    other, path = discovery.create_file("ab" * 16)
    os.write(other, b"ab" * 50)
    shared = discovery.SharedFile(other, 100)
    shared.hold(0)
    notes = [("cd" * 16, path, ""), ("ef" * 16, "", "")]
    assert discovery._first_visible(notes, 1, -1) == (1, -1)
    held = "import fcntl, os, sys; fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)"
    locked = subprocess.run([sys.executable, "-c", held, path], capture_output=True, text=True)
    assert "BlockingIOError" in locked.stderr
