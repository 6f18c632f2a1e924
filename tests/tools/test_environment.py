"""What ``syncnorm env`` prints, and what it hides."""

import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from versions import why_no_compiler

from syncnorm import native
from syncnorm.__main__ import main
from syncnorm.tools import env
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


class TestPassesOnAGpu:
    """On a stand-in, whose tensors are those of the meta device."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        if reason := why_no_compiler():
            pytest.skip(reason)
        from stand_in_gpu import stand_in_gpu

        monkeypatch.setattr(env, "_gpu", lambda device: f"GPU {device.index}")
        with stand_in_gpu() as gpu:
            yield gpu

    def test_triton_is_tried(self, gpu):
        assert env._passes(torch.device("meta")) == "Triton's kernels"
        assert gpu.names() == ["_moments_kernel"]

    @pytest.mark.filterwarnings("error")
    def test_the_reason_why_it_does_not_work(self, gpu):
        gpu.load_error = RuntimeError("Failed to find C compiler.")
        told = env._passes(torch.device("meta"))
        assert told == "torch's CUDA kernels: RuntimeError: Failed to find C compiler."

    def test_no_triton(self, gpu, monkeypatch):
        monkeypatch.setattr(env.launch, "_installed", lambda: False)
        assert "Triton is not installed" in env._passes(torch.device("meta"))
        assert gpu.launches == []

    def test_a_gpu_without_free_memory(self, gpu):
        with mock.patch.object(torch, "zeros", side_effect=torch.OutOfMemoryError("CUDA out of memory")):
            assert env._passes(torch.device("meta")) == "not known: CUDA out of memory"

    def test_each_gpu_has_a_line(self, gpu, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(env, "_passes", lambda device: f"those of {device.index}")
        lines = str(environment()).splitlines()
        first = lines.index("  0: GPU 0")
        assert lines[first : first + 4] == [
            "  0: GPU 0",
            "    passes: those of 0",
            "  1: GPU 1",
            "    passes: those of 1",
        ]
        assert env.Environment.from_dict(json.loads(json.dumps(environment().to_dict()))) == environment()


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


class TestNothingEndsIt:
    """``syncnorm env`` is for environments that are broken."""

    BROKEN = (
        (torch.backends.cudnn, "version", "cuDNN"),
        (env, "_nccl", "NCCL"),
        (torch.cuda, "device_count", "0"),
        (env, "cpu_name", "CPU"),
        (env, "create_file", "shared memory"),
        (env.metadata, "version", "numpy"),
    )

    @pytest.mark.parametrize(("module", "function", "line"), BROKEN, ids=[line for *_, line in BROKEN])
    def test_a_function_that_raises_is_a_line(self, monkeypatch, module, function, line):
        monkeypatch.setattr(module, function, mock.Mock(side_effect=KeyError("broken")))
        (found,) = [text for text in str(environment()).splitlines() if text.strip().startswith(f"{line}: ")]
        assert "not known: KeyError: 'broken'" in found

    def test_backends_whose_check_raises_or_does_not_exist(self, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_gloo_available", mock.Mock(side_effect=RuntimeError("broken")))
        monkeypatch.delattr(torch.distributed, "is_xccl_available")
        assert not {"gloo", "xccl"} & set(environment().backends)

    def test_a_user_without_a_home_directory(self, monkeypatch):
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        assert variables({"NCCL_DEBUG": "a~b"}) == {"NCCL_DEBUG": "a~b"}
