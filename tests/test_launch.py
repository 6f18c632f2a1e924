"""Recipes for one machine, and for clusters where one machine can stand in for them."""

import subprocess
import sys
from pathlib import Path

import pytest
from launches import ROOT, TRAIN, environment, epochs, free_port, run

LAUNCH = ROOT / "launch"
FIRST_EPOCH = (*TRAIN, "--epochs", "1", "--checkpoint")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")

pytestmark = pytest.mark.timeout(400)  # a quiet machine needs 10 s for the longest


RECIPES = sorted(file for file in LAUNCH.rglob("[a-z]*.*") if file.is_file())


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_recipe_says_what_it_is_for(file):
    lines = file.read_text().splitlines()
    head = lines[1:4] if lines[0].startswith("#!") else lines[:3]
    assert [line[:8].rstrip() for line in head] == ["# What:", "# When:", "# How:"]
    assert file.name in head[2]


def test_torchrun_takes_the_same_steps_on_one_rank_and_on_two(tmp_path):
    recipe = "bash", str(LAUNCH / "torchrun.sh"), str(ROOT / "tests" / "in_double.py"), *FIRST_EPOCH
    one, two = (run(*recipe, f"{ranks}.pt", cwd=tmp_path, RANKS=ranks) for ranks in "12")
    ((_, ranks_of_one, loss_of_one),) = epochs(one)
    ((_, ranks_of_two, loss_of_two),) = epochs(two)
    assert (ranks_of_one, ranks_of_two) == (1, 2)
    assert loss_of_one == pytest.approx(loss_of_two, abs=2e-6)


def test_a_recipe_without_its_script_says_how_to_call_it(tmp_path):
    for recipe in ("torchrun.sh", "torchrun_nodes.sh"):
        done = subprocess.run(["bash", str(LAUNCH / recipe)], env=environment(), capture_output=True, text=True)
        assert done.returncode != 0
        assert f"bash launch/{recipe} examples/train_ddp.py" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("cpu.yaml", "MULTI_CPU"),
        ("one_machine.yaml", None),  # what it is depends on the GPUs of this machine
        ("fsdp2.yaml", None),
    ],
)
def test_accelerate(tmp_path, config, kind):
    script = str(ROOT / "examples" / "train_launched.py"), "--epochs", "1"
    free_port = "--main_process_port", "0"
    use_cpu = {"ACCELERATE_USE_CPU": "true"} if kind else {}
    launch = *ACCELERATE, "--config_file", str(LAUNCH / "accelerate" / config), *free_port
    output = run(*launch, *script, cwd=tmp_path, **use_cpu)
    first, second = output.splitlines()
    assert first.startswith(f"2 ranks, {kind or ''}")
    assert second.startswith("epoch 0: test loss ")


def test_accelerate_shards_and_trains_as_without_shards(tmp_path):
    launch = *ACCELERATE, "--config_file", str(LAUNCH / "accelerate" / "fsdp2.yaml"), "--main_process_port", "0"
    script = str(ROOT / "examples" / "train_launched.py"), "--epochs", "1"
    *_, whole = run(*launch, *script, cwd=tmp_path).splitlines()  # no GPUs: DDP
    shards, kind, loss = run(*launch, str(ROOT / "tests" / "sharded.py"), *script, cwd=tmp_path).splitlines()
    assert shards == "7229 of 14458 parameters on rank 0"
    assert kind == "2 ranks, FSDP, cpu"
    assert loss == whole


def test_ray_train(tmp_path):
    pytest.importorskip("ray.train.torch", reason="needs syncnorm[launchers]")
    ray = sys.executable, str(LAUNCH / "ray_train.py"), "--storage", str(tmp_path / "ray")
    output = run(*ray, *FIRST_EPOCH, str(tmp_path / "ray.pt"), cwd=tmp_path)
    expected = run("bash", str(LAUNCH / "torchrun.sh"), *FIRST_EPOCH, "torchrun.pt", cwd=tmp_path, RANKS="2")
    assert set(epochs(output)) == set(epochs(expected)) != set()  # Ray shows a worker's lines more than once


def test_kubernetes_manifest_is_a_train_job():
    """By the models that Kubeflow generates from its own OpenAPI schema."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs syncnorm[launchers]")
    manifest = read_yaml(LAUNCH / "kubernetes.yaml")
    assert manifest["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert manifest["kind"] == "TrainJob"
    job = models.TrainerV1alpha1TrainJob.from_dict(manifest)
    assert job.to_dict() == manifest  # a field that the schema does not know, or knows elsewhere, is dropped

    with pytest.raises(ValueError, match="runtimeRef"):
        models.TrainerV1alpha1TrainJob.from_dict({**manifest, "spec": {"trainer": manifest["spec"]["trainer"]}})


def test_kubernetes_pod_runs_its_command(tmp_path):
    """In place of the pod: its command, with the variables by which the torch-distributed runtime tells torchrun."""
    trainer = read_yaml(LAUNCH / "kubernetes.yaml")["spec"]["trainer"]
    pod = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0"}
    meeting = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": free_port()}
    script, *arguments = trainer["args"]
    arguments = [a.replace("/shared", str(tmp_path)) for a in arguments]
    assert trainer["command"] == ["torchrun"]
    torchrun = sys.executable, "-m", "torch.distributed.run"
    output = run(*torchrun, str(ROOT / script), *arguments, cwd=tmp_path, **pod, **meeting)
    assert [epoch for epoch, _, _ in epochs(output)] == [0, 1, 2]
    assert (tmp_path / "digits.pt").exists()


def read_yaml(file: Path) -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(file.read_text())
