"""Job files: every option by its name, the command line first, modules beside the file."""

import sys

import click
import pytest
import user_jobs
from click.testing import CliRunner

from syncnorm.errors import InputError
from syncnorm.tools.cli import compare as command
from syncnorm.tools.cli.job_files import JobFile
from syncnorm.tools.compare.runner import make_settings

JOB = """
model = "near:build"
data = "near:data"
batch-per-rank = [2, 4]
eval_batch = 3
arms = ["ddp", "ddp+syncbn"]
lr = 0.5
steps = 7
"""
NEAR = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3))

def data():
    items = [(torch.randn(4), i % 3) for i in range(16)]
    return items, items[:6]
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job file and its module in a folder that is not the current one, and the settings that a command makes."""
    folder = tmp_path / "a job"
    folder.mkdir()
    (folder / "near.py").write_text(NEAR)
    (folder / "job.toml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "near", raising=False)
    made = {}

    def stop(problem, settings, *_, **__):
        made.update(problem=problem, settings=settings)
        raise InputError("stopped before the training")

    monkeypatch.setattr(sys.modules["syncnorm.tools.cli.compare"], "sweep", stop)
    return folder / "job.toml", made


def call(*arguments):
    result = CliRunner().invoke(command, [str(each) for each in arguments])
    return result.exit_code, " ".join(result.output.split())


def test_a_job_file_sets_options_and_the_command_line_comes_first(job):
    file, made = job
    code, out = call(file, "--steps", "9", "--batch-per-rank", "4")
    assert (code, "stopped before the training" in out) == (2, True)
    expected = make_settings(arms=["ddp", "ddp+syncbn"], batch_per_rank=4, eval_batch=3, lr=0.5, steps=9)
    assert made["settings"] == [expected]
    assert made["problem"].model_name == "near:build"
    assert call(file)[0] == 2
    assert [each.batch_per_rank for each in made["settings"]] == [2, 4]
    assert {each.steps for each in made["settings"]} == {7}


def test_modules_in_the_current_directory_are_found_too(job):
    file, made = job
    (file.parents[1] / "here.py").write_text(NEAR)
    call(file, "--model", "here:build")
    assert made["problem"].model_name == "here:build"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps = 3", "job.toml: no option is called 'stepps': did you mean steps"),
        ("batch_per_rnk = 3", "job.toml: no option is called 'batch_per_rnk': did you mean batch-per-rank"),
        ("zzz = 3", "no option is called 'zzz': the options are model, data,"),
        ("steps = ", "job.toml is not a TOML file:"),
        ("steps = true", "job.toml: steps: expected a text, a number, or a list of them, got True"),
        ("[steps]\na = 3", "job.toml: steps: expected a text, a number, or a list of them, got {'a': 3}"),
        ('steps = "many"', "Invalid value for '--steps': 'many' is not a valid integer"),
        ('model = "near:biuld"', "--model near:biuld: near has no 'biuld': did you mean build?"),
        ('metric = "miuo"', "no metric is called 'miuo': did you mean miou?"),
        ('model = "far:build"', "--model far:build: no module named far"),
    ],
)
def test_mistakes_in_a_job_file(job, text, message):
    file, _ = job
    file.write_text(text)
    code, out = call(file)
    assert code == 2
    assert message in out


def test_a_job_file_that_is_missing(job):
    code, out = call("missing.toml")
    assert code == 2
    assert "no job file missing.toml: expected a TOML file with the options of this command" in out


def test_a_metric_with_its_direction_can_be_named(job):
    file, made = job
    call(file, "--metric", "user_jobs:LARGEST")
    assert made["problem"].metric == user_jobs.LARGEST
    assert made["problem"].metric.info.name == "largest error"


@click.command()
@click.argument("job", required=False, type=JobFile(), is_eager=True)
@click.option("--steps", type=int, default=1)
@click.option("--batch-per-rank", default="2")
def steps_and_sizes(job, steps, batch_per_rank):
    click.echo(f"{steps} {batch_per_rank}")


def _values(path, text, *arguments):
    path.write_bytes(text)
    return CliRunner().invoke(steps_and_sizes, [str(path), *arguments])


@pytest.mark.parametrize("text", [
    b'steps = 3\nbatch-per-rank = [4, 8]\n',
    b'steps = 3\nbatch_per_rank = "4,8"\n',
    b'\xef\xbb\xbfsteps = 3\r\nbatch-per-rank = [4, 8]\r\n',
], ids=["list", "underscores", "of a Windows editor"])  # fmt: skip
def test_values_are_those_of_the_command_line(text, tmp_path):
    assert _values(tmp_path / "job.toml", text).output == "3 4,8\n"
    assert _values(tmp_path / "job.toml", text, "--steps", "5").output == "5 4,8\n"
