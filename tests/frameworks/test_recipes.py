"""The recipes in examples/frameworks, on two ranks, which must train as one process does on the whole batch."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from launches import ROOT, SHIMS, needs, needs_torchvision_operators, numbers, python, torchrun

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
DOCS = ROOT / "docs" / "recipes" / "frameworks.md"
# Code between ~~~ is part of a script; only code between ``` runs by itself.
SECTIONS = DOCS.read_text().split("\n## ")[1:]
LIMIT = 280  # seconds, for a command on a machine that does much else
pytestmark = pytest.mark.timeout(2 * LIMIT + 40)  # four processes a test, which import a framework


class Figures(NamedTuple):
    """What ``report`` of examples/frameworks/recipe.py printed."""

    synced: int
    norms: int
    difference: float
    losses: list[float]


def script(name: str) -> str:
    return str(ROOT / "examples" / "frameworks" / f"{name}.py")


def figures(output: str) -> list[Figures]:
    found = re.findall(
        r"(\d+) of (\d+) batch norms synced, running statistics of ranks differ by (\S+)\nlosses (.*)", output
    )
    return [Figures(int(synced), int(norms), float(apart), numbers(losses)) for synced, norms, apart, losses in found]


def assert_synced(found: Figures, norms: int) -> None:
    assert (found.synced, found.norms) == (norms, norms)
    assert found.difference == 0


@pytest.mark.parametrize("section", [s for s in SECTIONS if "~~~python" in s], ids=lambda s: s.partition("\n")[0])
def test_documented_code_is_from_the_scripts(section):
    ((name, linked),) = re.findall(r"\[(\w+)\.py\]\(\S+/frameworks/(\w+)\.py\)", section)
    assert name == linked
    source = Path(script(name)).read_text()
    for block in re.findall(r"~~~python\n(.*?)~~~", section, re.DOTALL):
        for excerpt in block.split("\n...\n"):
            assert excerpt.strip("\n") in source


def test_every_recipe_is_documented():
    scripts = {path.name for path in (ROOT / "examples" / "frameworks").glob("*.py")} - {"recipe.py"}
    assert scripts == set(re.findall(r"/frameworks/(\w+\.py)\)", DOCS.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "packages", "norms", "alone"),
    [
        ("fastai_vision", ("fastai", "accelerate"), 22, {}),  # fastai takes any WORLD_SIZE for a distributed run
        ("ignite_trainer", ("ignite",), 2, ALONE),
        ("mmcv_norm_cfg", ("mmcv",), 2, ALONE),
        ("mmengine_runner", ("mmengine",), 2, ALONE),
        ("monai_net", ("monai",), 2, ALONE),
        ("timm_model", ("timm",), 13, ALONE),
        ("torchvision_norm_layer", ("torchvision",), 20, ALONE),
    ],
)
def test_two_ranks_train_as_one(tmp_path, name, packages, norms, alone):
    needs(*packages, extra="frameworks")
    two = figures(torchrun(script(name), cwd=tmp_path, timeout=LIMIT, path=SHIMS))
    one = figures(python(script(name), cwd=tmp_path, timeout=LIMIT, path=SHIMS, **alone))
    assert len(two) == len(one) > 0
    for ranks, process in zip(two, one, strict=True):
        assert_synced(ranks, norms)
        assert ranks.losses == pytest.approx(process.losses, rel=1e-3)
        assert len(ranks.losses) > 2


@pytest.mark.slow
def test_graphs_with_different_numbers_of_nodes(tmp_path):
    needs("torch_geometric", extra="frameworks")
    output = torchrun(script("pyg_graph"), cwd=tmp_path, timeout=LIMIT)
    nodes = [numbers(part) for part in re.findall(r"nodes per step \[(.*?)\]", output)]
    assert len(nodes) == 2
    assert all(a != b for a, b in zip(*nodes, strict=True))
    (two,), (one,) = figures(output), figures(python(script("pyg_graph"), cwd=tmp_path, timeout=LIMIT, **ALONE))
    assert_synced(two, 2)
    assert two.losses == pytest.approx(one.losses, rel=1e-4)


@pytest.mark.slow
def test_quantized_model_has_no_batch_norm(tmp_path):
    output = torchrun(script("qat"), cwd=tmp_path, timeout=LIMIT)
    (found,) = figures(output)
    assert_synced(found, 2)
    assert found.losses[-1] < 0.7 * found.losses[0]
    (accuracy,) = re.findall(r"ConvReLU2d: accuracy (\S+)", output)
    assert float(accuracy) > 0.6


@pytest.mark.slow
def test_yolo_saves_plain_batch_norms(tmp_path):
    needs("ultralytics", extra="ultralytics")
    needs_torchvision_operators()
    output = torchrun(script("ultralytics_yolo"), cwd=tmp_path, timeout=LIMIT, YOLO_CONFIG_DIR=str(tmp_path))
    (found,) = figures(output)
    assert found.norms > 50
    assert_synced(found, found.norms)
    assert "saved with BatchNorm2d\n" in output
