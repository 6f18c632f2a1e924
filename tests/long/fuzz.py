"""The layer on random cases against fp64 ``F.batch_norm`` on the whole batch: shapes, splits, dtypes, layouts, masks.

    python tests/long/fuzz.py --cases 10000

Ranks are kept, and get many cases in one call.
"""

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "support"))  # where pytest finds it by itself
from cases import Case, compare, laid_out, run_case, valid

from syncnorm.testing import TOLERANCES, run_ranks


def draw(rng: random.Random) -> Case:
    """A case in which there is not just one value a channel, which is an error, or so few that rounding rules."""
    while True:
        mask = rng.choice(("", "", "positions", "rows", "places", "lengths"))
        case = Case(
            splits=tuple(rng.choice((0, 1, 1, 2, 3, 4, 5, 6)) for _ in range(rng.choice((2, 3)))),
            channels=rng.choice((1, 2, 3, 4, 5, 7, 8, 9, 16, 67, 130)),
            spatial=tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 3))),
            dtype=rng.choice(("float64", "float32", "bfloat16", "float16")),
            layout=rng.choice(("contiguous", "channels_last", "permuted", "sliced")),
            dy_layout=rng.choice(("contiguous", "channels_last", "permuted", "sliced", "expanded")),
            affine=rng.random() < 0.7,
            bias=rng.random() < 0.7,
            track=rng.random() < 0.7,
            momentum=rng.choice((None, 0.1, 0.5, 1.0)),
            mean=rng.choice((0.0, 3.0)),
            steps=rng.randint(1, 2),
            seed=rng.randrange(10**6),
            mask=mask,
        )
        if case.spatial == () and mask in ("places", "lengths"):
            continue
        if all(case.values(step) != 1 and well_conditioned(case, step) for step in range(case.steps)):
            return case


def well_conditioned(case: Case, step: int) -> bool:
    """Whether rounding of the input's dtype stays within the tolerances, for any implementation.

    Rounding of a channel's mean reaches the output times |mean| / std, and that of sums in the backward reaches dx
    times 1 / std. Where two or three values lie close together these are in the hundreds. The rounding of the mean in
    fp32 also reaches the gradient of the weight, times a rank's sum of dy, which is large if dy is constant.
    """
    parts = [valid(x, m) for x, m in zip(case.batch(step)[0], case.masks(step), strict=True)]
    x_CN = torch.cat([x.double().transpose(0, 1).flatten(1) for x in parts], 1)
    if x_CN.size(1) == 0:
        return True
    var, mean = torch.var_mean(x_CN, 1, correction=0)
    invstd = (var + case.layer().eps).rsqrt()
    size = mean.abs() * invstd
    sums_dy = [
        valid(laid_out(dy, case.dy_layout), m).double().transpose(0, 1).flatten(1).sum(1).abs()
        for dy, m in zip(case.batch(step)[1], case.masks(step), strict=True)
    ]
    rounding = max(float((size * sum_dy).max()) for sum_dy in sums_dy) * torch.finfo(torch.float32).eps / 2
    return float(invstd.max()) < 8 and float(size.max()) < 16 and rounding < TOLERANCES[torch.float32][1] / 2


def run_cases(cases: list[Case]) -> list[list[dict[str, Any]]]:
    return [run_case(case) for case in cases]


@dataclass
class Found:
    """Cases that differ from the reference, and how."""

    cases: int = 0
    mismatches: list[tuple[Case, str]] = field(default_factory=list)
    rounding: list[tuple[Case, str]] = field(default_factory=list)  # one process is as far off: 1/std is huge

    def __str__(self) -> str:
        return (
            f"{self.cases} cases, {len(self.mismatches)} mismatches, {len(self.rounding)} off in one process as well"
        )


def fuzz(count: int, seed: int = 0, at_once: int = 200, show: bool = False) -> Found:
    """Runs ``count`` random cases."""
    rng = random.Random(seed)
    drawn = [draw(rng) for _ in range(count)]
    found = Found()
    for world_size in (2, 3):
        cases = [case for case in drawn if len(case.splits) == world_size]
        for start in range(0, len(cases), at_once):
            part = cases[start : start + at_once]
            by_rank = run_ranks(run_cases, world_size, (part,), timeout=300)
            for case, *ranks in zip(part, *by_rank, strict=True):
                found.cases += 1
                message = difference(case, ranks)
                if message:
                    whole = replace(case, splits=(sum(case.splits),))
                    kind = found.rounding if difference(whole, [run_case(whole)]) else found.mismatches
                    kind.append((case, message))
                    if show:
                        print("off in one process as well:" if kind is found.rounding else "MISMATCH:", case, message)
            if show:
                print(found, flush=True)
    return found


def difference(case: Case, ranks: list[list[dict[str, Any]]]) -> str:
    """How ``ranks`` differ from the reference; nothing if they do not."""
    try:
        compare(case, ranks)
    except AssertionError as error:
        return str(error) or "padding, a counter or the ranks' buffers"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    found = fuzz(options.cases, options.seed, show=True)
    rng = random.Random(options.seed)
    cases = [draw(rng) for _ in range(options.cases)]
    for name, counts in {
        "ranks": Counter(len(case.splits) for case in cases),
        "dtype": Counter(case.dtype for case in cases),
        "layout": Counter(case.layout for case in cases),
        "mask": Counter(case.mask or "none" for case in cases),
        "an empty rank": Counter(0 in case.splits for case in cases),
    }.items():
        print(f"{name}: {dict(sorted(counts.items()))}")
    print(f"{found}; {time.monotonic() - started:.0f} s, torch {torch.__version__}, seed {options.seed}")
    sys.exit(bool(found.mismatches))


if __name__ == "__main__":
    main()
