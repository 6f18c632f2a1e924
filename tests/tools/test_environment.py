"""What ``syncnorm env`` prints, and what it hides."""

import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from syncnorm import native
from syncnorm.__main__ import main
from syncnorm.tools.env import environment, launcher, variables


def test_variables_hold_no_secret_and_no_home():
    home = str(Path.home())
    found = variables(
        {
            "NCCL_DEBUG": "INFO",
            "NCCL_TOPO_FILE": f"{home}/topology.xml",
            "GLOO_API_KEY": "abc",
            "SYNCNORM_TOKEN": "abc",
            "RANK": "1",
            "PATH": f"{home}/bin",
            "AWS_SECRET_ACCESS_KEY": "abc",
        }
    )
    assert found == {
        "GLOO_API_KEY": "(hidden)",
        "NCCL_DEBUG": "INFO",
        "NCCL_TOPO_FILE": "~/topology.xml",
        "RANK": "1",
        "SYNCNORM_TOKEN": "(hidden)",
    }


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "unknown: RANK and WORLD_SIZE are set"),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}, "torchrun"),
        ({"TORCHELASTIC_RUN_ID": "x", "ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch"),
        ({"SLURM_PROCID": "0"}, "srun"),
    ],
)
def test_launcher(environ, expected):
    assert launcher(environ) == expected


def test_text_and_json(monkeypatch, capsys):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.delenv("SYNCNORM_TRANSPORT", raising=False)
    outputs = []
    for arguments in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["syncnorm", "env", *arguments])
        assert main() == 0
        outputs.append(capsys.readouterr().out)
    text, data = outputs[0], json.loads(outputs[1])
    assert f"torch: {torch.__version__}" in text.splitlines()
    assert "  GLOO_SOCKET_IFNAME: lo" in text.splitlines()
    assert f"native code: {data['native']}" in text.splitlines()
    assert "transport: auto" in text.splitlines()
    assert f"  shared memory: {data['shared_memory']}" in text.splitlines()
    assert data["torch"] == torch.__version__ == environment().torch
    assert "gloo" in data["backends"]
    assert str(Path.home()) not in "".join(outputs)


def test_native_code_is_named_or_the_reason_why_there_is_none(monkeypatch):
    monkeypatch.setattr(native, "library", object())
    monkeypatch.setattr(native, "instruction_set", "v3")
    assert environment().native == "yes, v3"
    monkeypatch.setattr(native, "library", None)
    monkeypatch.setattr(native, "absent", "turned off by SYNCNORM_NATIVE=0")
    assert environment().native == "no: turned off by SYNCNORM_NATIVE=0"


def test_what_ranks_of_this_host_can_share(monkeypatch, tmp_path):
    monkeypatch.setenv("SYNCNORM_TRANSPORT", "gloo")
    found = environment()
    assert found.transport == "gloo"
    if sys.platform == "linux":
        assert found.shared_memory == "an anonymous file (memfd)"
    mkstemp = tempfile.mkstemp
    with mock.patch.object(os, "memfd_create", side_effect=OSError("forbidden"), create=True):
        with mock.patch.object(tempfile, "mkstemp", lambda prefix, **_: mkstemp(prefix=prefix, dir=tmp_path)):
            assert environment().shared_memory == f"a file in {tmp_path}"
        assert not list(tmp_path.iterdir())
        with mock.patch.object(tempfile, "mkstemp", side_effect=OSError("read-only")):
            assert "  shared memory: no" in str(environment()).splitlines()
