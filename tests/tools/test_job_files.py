"""The options of a command in a TOML file."""

import click
import pytest
from click.testing import CliRunner

from syncnorm.tools.cli.job_files import JobFile


@click.command()
@click.argument("job", required=False, type=JobFile(), is_eager=True)
@click.option("--steps", type=int, default=1)
@click.option("--batch-per-rank", default="2")
def command(job, steps, batch_per_rank):
    click.echo(f"{steps} {batch_per_rank}")


def _run(path, text, *arguments):
    path.write_bytes(text)
    return CliRunner().invoke(command, [str(path), *arguments])


@pytest.mark.parametrize("text", [
    b'steps = 3\nbatch-per-rank = [4, 8]\n',
    b'steps = 3\nbatch_per_rank = "4,8"\n',
    b'\xef\xbb\xbfsteps = 3\r\nbatch-per-rank = [4, 8]\r\n',
], ids=["list", "underscores", "of a Windows editor"])  # fmt: skip
def test_values_are_those_of_the_command_line(text, tmp_path):
    assert _run(tmp_path / "job.toml", text).output == "3 4,8\n"
    assert _run(tmp_path / "job.toml", text, "--steps", "5").output == "5 4,8\n"


@pytest.mark.parametrize(("text", "message"), [
    (b"stpes = 3", "no option is called 'stpes': did you mean steps"),
    (b"steps = true", "steps: expected a text, a number, or a list of them, got True"),
    (b"[steps]\nnumber = 3", "steps: expected a text, a number, or a list of them, got {'number': 3}"),
    (b"steps = ", "is not a TOML file"),
    (b"steps = 3 # \xff", "is not a TOML file"),
    (b"steps = 'three'", "'three' is not a valid integer"),
])  # fmt: skip
def test_mistakes_are_said_in_one_line(text, message, tmp_path):
    found = _run(tmp_path / "job.toml", text)
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())
