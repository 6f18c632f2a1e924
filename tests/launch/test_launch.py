"""Recipes for one machine, and for clusters that one machine can simulate."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launches import ROOT, SUPPORT, TRAIN, environment, epochs, free_port, run

LAUNCH = ROOT / "launch"
FIRST_EPOCH = (*TRAIN, "--epochs", "1", "--checkpoint")
LAUNCHED = (str(ROOT / "examples" / "train_launched.py"), "--epochs", "1")

pytestmark = pytest.mark.timeout(400)  # a quiet machine needs 10 s for the longest


RECIPES = sorted(file for file in LAUNCH.rglob("[a-z]*.*") if file.is_file())


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_recipe_says_what_it_is_for(file):
    lines = file.read_text().splitlines()
    head = lines[1:4] if lines[0].startswith("#!") else lines[:3]
    assert [line[:8].rstrip() for line in head] == ["# What:", "# When:", "# How:"]
    assert file.name in head[2]


@pytest.mark.slow
def test_torchrun_takes_the_same_steps_on_one_rank_and_on_two(tmp_path):
    recipe = "bash", str(LAUNCH / "torchrun.sh"), str(SUPPORT / "in_double.py"), *FIRST_EPOCH
    one, two = (run(*recipe, f"{ranks}.pt", cwd=tmp_path, RANKS=ranks) for ranks in "12")
    ((_, ranks_of_one, loss_of_one),) = epochs(one)
    ((_, ranks_of_two, loss_of_two),) = epochs(two)
    assert (ranks_of_one, ranks_of_two) == (1, 2)
    assert loss_of_one == pytest.approx(loss_of_two, abs=2e-6)


def complaint(*command: str, **env: str) -> list[str]:
    """The lines on stderr of a command that must fail."""
    done = subprocess.run(command, env=environment(**env), capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr.splitlines()


@pytest.mark.parametrize("shell", ["bash", "sh"])
@pytest.mark.parametrize("recipe", ["torchrun.sh", "torchrun_nodes.sh"])
def test_a_recipe_without_its_script_says_how_to_call_it(recipe, shell):
    (line,) = complaint(shell, str(LAUNCH / recipe))
    assert f"bash launch/{recipe} examples/train_ddp.py" in line


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({}, "give the address of the first machine"),
        ({"FIRST": "no.such.invalid"}, "FIRST=no.such.invalid has no IPv4 address here"),
        (
            {"FIRST": "127.0.0.1", "ADDRESS": "198.51.100.7"},
            "no interface of this machine has the address 198.51.100.7",
        ),
    ],
)
def test_several_machines_need_a_reachable_first_one(where, said):
    if shutil.which("ip", path=environment()["PATH"]) is None:
        pytest.skip("no ip: apt-get install iproute2")
    (line,) = complaint("bash", str(LAUNCH / "torchrun_nodes.sh"), *TRAIN, **where)
    assert line.endswith(said) or f"{said}:" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--global-batch", "7"], "--global-batch 7 does not divide among 2 ranks"),
        (["--checkpoint", "nowhere/digits.pt"], "--checkpoint nowhere/digits.pt: there is no such folder"),
    ],
)
def test_the_example_checks_its_arguments_before_it_connects(arguments, said):
    assert complaint(sys.executable, *TRAIN, *arguments, WORLD_SIZE="2")[-1].endswith(f"error: {said}")


def accelerate(config: str) -> tuple[str, ...]:
    file = str(LAUNCH / "accelerate" / config)
    return sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", "0"


def loss_in(line: str) -> float:
    return float(re.fullmatch(r"epoch 0: test loss ([\d.]+), accuracy [\d.]+", line)[1])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> float:
    what, loss = run(sys.executable, *LAUNCHED, cwd=tmp_path_factory.mktemp("one")).splitlines()
    assert what == "1 ranks, NO, cpu"
    return loss_in(loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("cpu.yaml", "MULTI_CPU"),
        ("one_machine.yaml", None),  # depends on the GPUs of this machine
        ("fsdp2.yaml", None),
    ],
)
def test_accelerate_takes_the_steps_of_one_process(tmp_path, one_process, config, kind):
    use_cpu = {"ACCELERATE_USE_CPU": "true"} if kind else {}
    what, loss = run(*accelerate(config), *LAUNCHED, cwd=tmp_path, **use_cpu).splitlines()
    assert what.startswith(f"2 ranks, {kind or ''}")
    assert loss_in(loss) == pytest.approx(one_process, abs=1e-3)


@pytest.mark.slow
def test_accelerate_shards_and_takes_the_steps_of_one_process(tmp_path, one_process):
    sharded = *accelerate("fsdp2.yaml"), str(SUPPORT / "sharded.py")
    shards, what, loss = run(*sharded, *LAUNCHED, cwd=tmp_path).splitlines()
    assert shards == "7229 of 14458 parameters on rank 0"
    assert what == "2 ranks, FSDP, cpu"
    assert loss_in(loss) == pytest.approx(one_process, abs=1e-3)


@pytest.mark.slow
def test_ray_train(tmp_path):
    pytest.importorskip("ray.train.torch", reason="needs syncnorm[launchers]")
    ray = sys.executable, str(LAUNCH / "ray_train.py"), "--storage", str(tmp_path / "ray")
    output = run(*ray, *FIRST_EPOCH, "ray.pt", cwd=tmp_path)
    expected = run("bash", str(LAUNCH / "torchrun.sh"), *FIRST_EPOCH, "torchrun.pt", cwd=tmp_path, RANKS="2")
    assert set(epochs(output)) == set(epochs(expected)) != set()  # Ray shows a worker's lines more than once
    assert (tmp_path / "ray.pt").exists()


def test_kubernetes_manifest_is_a_train_job():
    """Validated by the models that Kubeflow generates from its OpenAPI schema."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs syncnorm[launchers]")
    manifest = read_yaml(LAUNCH / "kubernetes.yaml")
    assert manifest["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert manifest["kind"] == "TrainJob"
    job = models.TrainerV1alpha1TrainJob.from_dict(manifest)
    assert job.to_dict() == manifest  # fields that are unknown to the schema, or misplaced, would be dropped

    with pytest.raises(ValueError, match="runtimeRef"):
        models.TrainerV1alpha1TrainJob.from_dict({**manifest, "spec": {"trainer": manifest["spec"]["trainer"]}})


@pytest.mark.slow
def test_kubernetes_pod_runs_its_command(tmp_path):
    """Runs the command of the pod with the variables that the torch-distributed runtime sets for torchrun."""
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
