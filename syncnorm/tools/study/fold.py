"""How much folding batch norm into the preceding convolutions speeds up inference, and whether outputs are equal."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from syncnorm.conversion.convert import convert, revert
from syncnorm.conversion.fold import fold
from syncnorm.tools.common.decision import Difference, Rule
from syncnorm.tools.common.nets import ResidualNet
from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.experiment import DATA_NOTE, Recipe, batches, build_net, correct, fit, load_images
from syncnorm.tools.study.findings import difference, levels, percent, runs, support, values, verdict, would_decide
from syncnorm.tools.study.records import Claim, Outcome, Question, StudyRow, StudySettings, Value, View
from syncnorm.tools.study.trials import Trial, Trials, run_trials

PLAIN_WIDTHS = (64, 64, 128, 128)
# ResNet-18's depth and widths: two blocks per width, after a stem for small images.
RESIDUAL_WIDTHS = (64, 64, 128, 128, 256, 256, 512, 512)
SEPARABLE_WIDTHS = (64, 128, 128, 256, 256, 512)

SPEEDUP, MAX_DIFFERENCE, SAME, UNFOLDED, LAYERS = (
    "speed-up",
    "relative difference",
    "same answer",
    "norms left",
    "norms",
)
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
BATCHES = (1, 32)
RANK_BATCH = 16
LR = 0.05
# Number of images whose outputs are compared.
COMPARED = 256
REPETITIONS, QUICK_REPETITIONS = 15, 3
# Long compared with reading the clock, short compared with changes in the load of the machine.
BLOCK_S = 0.02


def plain(seed: int) -> nn.Module:
    """3x3 convolutions, each with batch norm and ReLU: (N, 1, 14, 14) -> (N, 10)."""
    return build_net(seed, PLAIN_WIDTHS)


def residual(seed: int) -> nn.Module:
    """Residual blocks with the depth and the widths of ResNet-18: (N, 1, H, W) -> (N, 10)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResidualNet(RESIDUAL_WIDTHS)


def separable(seed: int) -> nn.Module:
    """A stem, then a depthwise 3x3 and a pointwise 1x1 convolution per width: (N, 1, H, W) -> (N, 10).

    Source: Howard et al., "MobileNets" (2017), figure 3: batch norm and ReLU after each of the two.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width_in = SEPARABLE_WIDTHS[0] // 2
        layers = _conv_bn_relu(nn.Conv2d(1, width_in, 3, padding=1, bias=False))
        for before, width in zip((0, *SEPARABLE_WIDTHS), SEPARABLE_WIDTHS, strict=False):
            stride = 2 if 0 < before < width else 1
            depthwise = nn.Conv2d(width_in, width_in, 3, stride, padding=1, groups=width_in, bias=False)
            layers += _conv_bn_relu(depthwise) + _conv_bn_relu(nn.Conv2d(width_in, width, 1, bias=False))
            width_in = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, 10))


def _conv_bn_relu(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()]


RESIDUAL = "ResNet-18-like"
MODELS: dict[Value, Callable[[int], nn.Module]] = {
    "plain": plain,
    RESIDUAL: residual,
    "depthwise separable": separable,
}


def _train(trial: Trial, ranks: Ranks, together: bool, repetitions: int) -> list[StudyRow]:
    images = load_images()
    model = convert(MODELS[trial.condition["model"]](trial.seed))
    part = slice(ranks.rank * RANK_BATCH, (ranks.rank + 1) * RANK_BATCH)
    data = batches(images.train_x, images.train_y, RANK_BATCH * ranks.world_size, trial.seed, part)
    fit(DistributedDataParallel(model), data, Recipe(trial.lr, trial.steps))
    rows = _measured(model, trial, repetitions) if ranks.rank == 0 else []
    ranks.wait()  # the other ranks leave the cores to rank 0 while it measures
    return rows


@torch.inference_mode()
def _measured(model: nn.Module, trial: Trial, repetitions: int) -> list[StudyRow]:
    images = load_images()
    unfolded, folded = revert(copy.deepcopy(model)).eval(), fold(model)
    x, y = images.test_x[:COMPARED], images.test_y[:COMPARED]

    def row(measure: str, value: float, **more: Value) -> StudyRow:
        return StudyRow({**trial.condition, **more}, trial.seed, measure, value)

    want, got = unfolded(x), folded(x)
    rows = [
        StudyRow.of_images(trial.condition, trial.seed, "accuracy", correct(unfolded, x, y)),
        row(MAX_DIFFERENCE, float((got - want).abs().max() / want.abs().max())),
        row(SAME, float((got.argmax(dim=1) == want.argmax(dim=1)).double().mean())),
        row(LAYERS, _num_norms(unfolded)),
        row(UNFOLDED, _num_norms(folded)),
    ]
    for name, memory_format in FORMATS.items():
        for module in (unfolded, folded):
            module.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's stubs lack it
        for batch in BATCHES:
            sample = images.test_x[:batch].to(memory_format=memory_format)
            rows.append(row(SPEEDUP, speedup(unfolded, folded, sample, repetitions), format=name, batch=batch))
    return rows


def _num_norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def speedup(slow: nn.Module, fast: nn.Module, x: Tensor, repetitions: int) -> float:
    """Median over the repetitions of ``slow``'s time / ``fast``'s; each times both, in alternating order."""
    calls = max(1, round(BLOCK_S / max(_seconds(fast, x, 1) for _ in range(3))))
    _seconds(slow, x, 1)
    ratios = []
    for repetition in range(repetitions):
        order = (slow, fast) if repetition % 2 == 0 else (fast, slow)
        seconds = {module: _seconds(module, x, calls) for module in order}
        ratios.append(seconds[slow] / seconds[fast])
    return median(ratios)


def _seconds(module: nn.Module, x: Tensor, calls: int) -> float:
    # The thread's CPU clock stops while another process has its core. The whole pass runs in this one thread.
    started = time.thread_time()
    for _ in range(calls):
        module(x)
    return time.thread_time() - started


def _trials(settings: StudySettings) -> Trials:
    models = [name for name in MODELS if name != RESIDUAL or not settings.quick]
    return Trials(
        [Trial({"model": model}, LR, seed, settings.steps) for seed in range(settings.seeds) for model in models]
    )


def num_stages(settings: StudySettings) -> int:
    """Number of networks that are trained."""
    return _trials(settings).num_stages(settings.world_size)


def run(settings: StudySettings, ranks: Ranks, tell: Tell) -> Outcome:
    """Trains each network with each seed and SyncBN; folds and times it on rank 0. Collective: all ranks."""
    repetitions = QUICK_REPETITIONS if settings.quick else REPETITIONS
    rows = run_trials(_trials(settings), partial(_train, repetitions=repetitions), ranks, tell)
    accuracies = ", ".join(
        f"{name} {percent(values(rows, 'accuracy', model=name))}" for name in levels(rows, "model")
    )
    notes = {
        "data": DATA_NOTE,
        "model": f"each trained with SyncBN on {ranks.world_size} ranks of {RANK_BATCH} images for {settings.steps} "
        f"steps; accuracy on {COMPARED} test images: {accuracies}. The result of syncnorm.fold is compared with that "
        "of syncnorm.revert (plain batch norms).",
        "timing": "forward passes in fp32 under torch.inference_mode on one thread, measured by the CPU clock of "
        "that thread while the other ranks sleep; the two networks alternate in blocks of "
        f"{1e3 * BLOCK_S:.0f} ms or one call, and the value of a seed is the median of {repetitions} ratios.",
    }
    return Outcome(rows, notes)


def find(rows: Sequence[StudyRow], rule: Rule) -> list[str]:
    """Whether the folded networks predict the same, how much faster they are, and where folding gains most."""
    found, gains = [_equality(rows)], dict[str, Difference]()
    for model in levels(rows, "model"):
        for batch in levels(rows, "batch"):
            case = f"{model}, batch size {batch}"
            by_format = {name: _gain(rows, rule, model, batch, name) for name in levels(rows, "format")}
            gains |= {f"{case}, {name}": gain for name, gain in by_format.items()}
            texts = [f"{_speedup(gain)} {name}" for name, gain in by_format.items()]
            found.append(f"Speed-up by folding (95% intervals), {case}: {', '.join(texts)}.")
    most = max(gains, key=lambda case: gains[case].mean)
    if gains[most].kind == "better":
        found.append(f"The largest speed-up by folding is {_speedup(gains[most])} ({most}).")
    claim = verdict("folding makes inference faster", [support(gain, "better") for gain in gains.values()])
    return [*found, claim]


def _gain(rows: Sequence[StudyRow], rule: Rule, model: Value, batch: Value, name: Value) -> Difference:
    """How much more than 1 the speed-up is."""
    speedups = runs(rows, SPEEDUP, model=model, batch=batch, format=name)
    return difference(speedups, {seed: replace(row, value=1.0) for seed, row in speedups.items()}, rule)


def _speedup(gain: Difference) -> str:
    remarks = {
        "better": "",
        "worse": ", slower",
        "equivalent": f", equally fast within {gain.margin:g}",
        "undecided": f", undecided: {would_decide(gain)}" if gain.kind == "undecided" else "",
    }
    return f"{1 + gain.mean:.2f} ({1 + gain.low:.2f} to {1 + gain.high:.2f}{remarks[gain.kind]})"


def _equality(rows: Sequence[StudyRow]) -> str:
    def all_of(measure: str) -> list[float]:
        return [row.value for row in rows if row.measure == measure]

    unfolded, layers = sum(all_of(UNFOLDED)), sum(all_of(LAYERS))
    norms = f"{unfolded:.0f} of {layers:.0f} batch norms are not folded" if unfolded else "All batch norms are folded"
    same = min(all_of(SAME))
    predictions = (
        "all predictions stay the same"
        if same == 1
        else f"in the worst network {100 * same:.1f} % of the predictions stay the same"
    )
    return f"{norms}; outputs differ by at most {max(all_of(MAX_DIFFERENCE)):.0e} of the largest, and {predictions}."


def views(rows: Sequence[StudyRow]) -> list[View]:
    """Speed-up by model and batch size, one view per memory format."""
    return [
        View(f"Speed-up by folding, {name}", SPEEDUP, "model", "batch", {"format": name}, unit="ratio")
        for name in levels(rows, "format")
    ]


QUESTION = Question(
    name="fold",
    about="Folding batch norm into convolutions: inference speed, equal outputs.",
    question="How much faster is inference with batch norm folded into the convolutions, and are the outputs equal?",
    claim=Claim(
        "for inference batch norm belongs in the weights and biases of the convolution before it, where it costs "
        "nothing and the network computes the same",
        "Jacob et al. 2018, section 3.2",
    ),
    seeds=3,
    steps=40,
    rule=Rule(share=False),
    quick_steps=2,
    num_stages=num_stages,
    run=run,
    find=find,
    views=views,
)
