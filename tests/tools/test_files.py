"""Files are written completely or not at all."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from syncnorm.tools.common.files import write_file


def test_a_write_that_fails_half_way_leaves_the_previous_file(tmp_path):
    file = tmp_path / "out.json"
    file.write_text("previous")
    with _files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
        write_file(file, b"x" * 5000)
    assert file.read_text() == "previous"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_and_the_mode_stay(tmp_path):
    file, link = tmp_path / "out.json", tmp_path / "link"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    write_file(link, b"new")
    assert link.is_symlink()
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", 0o640)


def test_stdout_that_is_a_file_keeps_what_was_printed(tmp_path):
    with (tmp_path / "stdout").open("w") as stdout:
        print("printed", file=stdout, flush=True)
        write_file(Path(f"/proc/self/fd/{stdout.fileno()}"), b"written")
    assert (tmp_path / "stdout").read_text() == "printed\nwritten"


@contextmanager
def _files_of_at_most(num_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
