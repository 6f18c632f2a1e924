"""Many training jobs, one fault in each: does every rank that survives end in time, and with a clear error?

    python tests/faults.py --faults 120

Each job is two or three processes that train a small net with three synced norms in DDP. At a random step, on a
random rank, one thing goes wrong. What became of the others is judged from outside, by their exit statuses and by
what an undisturbed run would have given: a single process on the whole batch, in fp64.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm import functional

STEPS, CHANNELS = 4, 8
LAYERS = ("norm1", "norm2", "norm3")
MARGIN = 10.0  # seconds beyond the group's timeout in which a rank must have raised or finished, on a busy machine
EXITING = 60.0  # seconds for the interpreter to end after that
STARTING = 90.0  # seconds for a job in which the fault has not happened yet
KINDS = {
    "kill": "SIGKILL at a random moment, or while the others wait in a layer",
    "skip": "one forward leaves a norm out",
    "reorder": "one forward calls two norms in the other order",
    "widen": "from one forward on, a norm has another width",
    "extra": "one more training forward, of the model or of DDP",
    "nan": "one value of the input is NaN: no error, but NaN everywhere alike",
}


@dataclass(frozen=True)
class Fault:
    """One job and what goes wrong in it."""

    kind: str
    seed: int
    rows: tuple[int, ...]  # of each rank
    rank: int
    step: int
    layer: str
    other: str  # to change places with
    factor: int  # of the width
    how: str  # kill: timer, asleep; extra: model before, model after, DDP before, DDP after; of the step
    delay: float  # seconds
    broadcast_buffers: bool  # DDP's option

    @classmethod
    def draw(cls, kind: str, seed: int) -> "Fault":
        """A fault of ``kind``; the rest by chance."""
        rng = random.Random(f"{kind} {seed}")
        rows = tuple(rng.randint(1, 4) for _ in range(rng.choice((2, 3))))
        layer, other = rng.sample(LAYERS, 2)
        kills, extras = (
            ("timer", "timer", "asleep"),
            [f"{w} {t}" for w in ("model", "DDP") for t in ("before", "after")],
        )
        how = {"kill": rng.choice(kills), "extra": rng.choice(extras)}.get(kind, "")
        delay = rng.uniform(0, 2.5) if how == "asleep" else rng.uniform(0, 0.06)
        return cls(
            kind, seed, rows, rng.randrange(len(rows)), rng.randrange(STEPS), layer, other,
            rng.choice((2, 40)), how, delay, rng.random() < 0.5,
        )  # fmt: skip

    def batch(self, step: int) -> tuple[list[Tensor], list[Tensor]]:
        """Images and classes by rank."""
        generator = torch.Generator().manual_seed(self.seed * STEPS + step)
        x = torch.randn(sum(self.rows), CHANNELS, 6, 6, generator=generator, dtype=torch.float64)
        classes = torch.randint(0, 5, (sum(self.rows),), generator=generator)
        inputs = list(x.split(self.rows))
        if self.kind == "nan" and step == self.step:
            inputs[self.rank][0, 1, 2, 3] = torch.nan
        return inputs, list(classes.split(self.rows))


class Net(nn.Module):
    """Three norms of one width, the first of them on the images themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(CHANNELS)
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3)
        self.norm2 = nn.BatchNorm2d(CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3)
        self.norm3 = nn.BatchNorm2d(CHANNELS)
        self.head = nn.Linear(CHANNELS, 5)
        self.fault: Fault | None = None  # in the next forward, on this rank
        self.notes = Path()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.norm("norm1", x))
        x = self.conv2(self.norm("norm2", x).relu())
        return self.head(self.norm("norm3", x).relu().mean((2, 3)))

    def norm(self, name: str, x: Tensor) -> Tensor:
        fault = self.fault
        if fault is None or name not in (fault.layer, *([fault.other] if fault.kind == "reorder" else [])):
            return getattr(self, name)(x)
        if fault.kind == "reorder":
            happens(self.notes)
            return getattr(self, fault.other if name == fault.layer else fault.layer)(x)
        if fault.kind == "skip":
            happens(self.notes)
            return x
        if fault.kind == "widen":
            happens(self.notes)
            # What DDP knows of stays as it is, so that no gradient bucket has another size: the layer disagrees.
            return functional.sync_batch_norm(x.repeat(1, fault.factor, 1, 1), None, None, training=True, layer=name)[
                :, :CHANNELS
            ]
        if fault.how == "asleep":
            time.sleep(fault.delay)
            happens(self.notes)
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(self, name)(x)


def happens(notes: Path) -> None:
    """Tells the parent when; its clock is the same."""
    if not (notes / "happened").exists():
        note(notes / "happened", str(time.monotonic()))


def train(fault: Fault, rank: int, notes: Path, timeout: float) -> dict[str, Any]:
    """One rank's training; what it ended with."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{notes}/store",
        rank=rank,
        world_size=len(fault.rows),
        timeout=timedelta(seconds=timeout),
    )
    torch.manual_seed(fault.seed)
    model = syncnorm.convert(Net().double())
    model.notes = notes
    ddp = DistributedDataParallel(model, broadcast_buffers=fault.broadcast_buffers)
    optimiser = torch.optim.SGD(ddp.parameters(), lr=0.05)
    logits = torch.empty(0)
    for step in range(STEPS):
        inputs, classes = (part[rank] for part in fault.batch(step))
        here = rank == fault.rank and (step == fault.step or (fault.kind == "widen" and step > fault.step))
        model.fault = fault if here else None
        if here and fault.how == "timer":
            threading.Thread(target=killed, args=(fault.delay, notes), daemon=True).start()
        if here and fault.how in ("model before", "DDP before"):
            happens(notes)
            (model if "model" in fault.how else ddp)(inputs)
        optimiser.zero_grad()
        logits = ddp(inputs)
        loss(logits, classes, fault).mul(len(fault.rows)).backward()  # DDP divides by the number of ranks
        optimiser.step()
        if here and fault.how in ("model after", "DDP after"):
            happens(notes)
            (model if "model" in fault.how else ddp)(inputs)
        if here:
            happens(notes)  # a NaN
    return {"logits": logits.detach(), "state": {k: v.detach() for k, v in model.state_dict().items()}}


def killed(delay: float, notes: Path) -> None:
    time.sleep(delay)
    happens(notes)
    os.kill(os.getpid(), signal.SIGKILL)


def loss(logits: Tensor, classes: Tensor, fault: Fault) -> Tensor:
    """This rank's part of the mean over the whole batch."""
    return F.cross_entropy(logits, classes, reduction="sum") / sum(fault.rows)


def undisturbed(fault: Fault) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What a single process gives: the last step's logits by rank, and the state after it."""
    with torch.random.fork_rng():
        torch.manual_seed(fault.seed)
        model = Net().double()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    logits = torch.empty(0)
    for step in range(STEPS):
        inputs, classes = (torch.cat(part) for part in fault.batch(step))
        optimiser.zero_grad()
        logits = model(inputs)
        loss(logits, classes, fault).backward()
        optimiser.step()
    return list(logits.detach().split(fault.rows)), model.state_dict()


def rank_process(fault: Fault, rank: int, notes: Path, timeout: float) -> None:
    """The program of one rank. An error ends it as it would end a user's script: with a traceback."""
    torch.set_num_threads(1)
    try:
        result = train(fault, rank, notes, timeout)
    except Exception as error:
        files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        told = {
            "at": time.monotonic(),
            "ours": isinstance(error, syncnorm.SyncNormError),
            "from us": any(Path(syncnorm.__file__).parent in file.parents for file in files),
            "text": str(error),
        }
        note(notes / f"error{rank}", json.dumps(told))
        raise
    torch.save(result, notes / f"saving{rank}")  # a timer may kill it meanwhile
    (notes / f"saving{rank}").rename(notes / f"result{rank}")
    dist.destroy_process_group()


@dataclass
class Verdict:
    """What became of the ranks of one job."""

    fault: Fault
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # from the fault to each error
    told: list[str] = field(default_factory=list)  # of what should not be


BAD = ("hang", "abort", "silent", "unclear")
OUTCOMES = ("layer error", "DDP error", "equal", *BAD)


def judge(fault: Fault, timeout: float, ranks: "Ranks") -> Verdict:
    """Runs the job to its end."""
    verdict = Verdict(fault)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        notes = Path(folder)
        ranks.start(fault, notes)
        hanging = wait(fault, notes, timeout)
        happened = notes / "happened"
        at = float(happened.read_text()) if happened.exists() else None
        results = {r: torch.load(p) for r in range(len(fault.rows)) if (p := notes / f"result{r}").exists()}
        for rank in range(len(fault.rows)):
            error, stderr = notes / f"error{rank}", (notes / f"stderr{rank}").read_text()
            code = int((notes / f"status{rank}").read_text())
            if fault.kind == "kill" and rank == fault.rank and code == -signal.SIGKILL and rank not in hanging:
                continue
            told = json.loads(error.read_text()) if error.exists() else None
            if rank in hanging:
                outcome = "hang"
            elif code not in (0, 1) or (told is None and rank not in results):
                outcome = "abort"
            elif told is not None:
                named = told["ours"] and any(layer in told["text"] for layer in LAYERS)
                of_ddp = not told["ours"] and not told["from us"] and told["text"]
                outcome = "layer error" if named else "DDP error" if of_ddp else "unclear"
                verdict.seconds.append(told["at"] - (at or told["at"]))
            else:
                outcome = "equal" if harmless(fault, rank, results) else "silent"
            verdict.outcomes[outcome] += 1
            if outcome in BAD:
                verdict.told.append(f"rank {rank}: {outcome}, exit status {code}\n{stderr[-3000:]}")
    return verdict


class Ranks:
    """Starts rank processes, forked from one that has imported torch: importing it anew takes seconds of a core."""

    def __init__(self, timeout: float) -> None:
        command = [sys.executable, "-X", "faulthandler", __file__, "--timeout", str(timeout), "--serve"]
        home = str(Path(syncnorm.__file__).parents[1])
        environ = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": home}
        self._server = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, text=True)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def start(self, fault: Fault, notes: Path) -> None:
        """Asks for the processes of one job."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps([asdict(fault), str(notes)]) + "\n")
        self._server.stdin.flush()


def serve(timeout: float) -> None:
    """Reads jobs and forks their ranks. Those of every fifth end like any Python program, which takes seconds."""
    import torch._dynamo  # noqa: F401  # as DDP and the optimiser would, each for seconds

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while job := sys.stdin.readline():
        fields, notes = json.loads(job)
        fault = Fault(**fields | {"rows": tuple(fields["rows"])})
        for rank in range(len(fault.rows)):
            if os.fork() == 0:
                if watch(Path(notes), rank):
                    os._exit(0)
                try:
                    rank_process(fault, rank, Path(notes), timeout)
                except Exception:
                    if fault.seed % 5 == 0:
                        raise
                    traceback.print_exc()
                    os._exit(1)
                if fault.seed % 5 == 0:
                    return
                os._exit(0)


def watch(notes: Path, rank: int) -> bool:
    """Forks a rank; notes its id and how it ended. False in the rank."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        stderr = os.open(notes / f"stderr{rank}", os.O_CREAT | os.O_WRONLY)
        for theirs in (1, 2):
            os.dup2(stderr, theirs)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        return False
    note(notes / f"pid{rank}", str(pid))
    _, status = os.waitpid(pid, 0)
    note(notes / f"status{rank}", str(os.waitstatus_to_exitcode(status)))
    return True


def note(path: Path, text: str) -> None:
    """Writes a file that nobody sees half written."""
    new = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")  # two ranks may note the same at once
    new.write_text(text)
    new.rename(path)


def wait(fault: Fault, notes: Path, timeout: float) -> set[int]:
    """Waits for the ranks to end; those that did not in time are killed, and returned."""
    deadline = time.monotonic() + STARTING
    alive = set(range(len(fault.rows)))
    hanging: set[int] = set()
    while alive:
        if (notes / "happened").exists():
            deadline = float((notes / "happened").read_text()) + timeout + MARGIN
        time.sleep(0.05)
        alive = {rank for rank in alive if not (notes / f"status{rank}").exists()}
        for rank in alive - hanging:
            ending = (notes / f"error{rank}").exists() or (notes / f"result{rank}").exists()
            if time.monotonic() > deadline + ending * EXITING:
                os.kill(int((notes / f"pid{rank}").read_text()), signal.SIGABRT)  # writes its stacks
                hanging.add(rank)
    return hanging


def harmless(fault: Fault, rank: int, results: dict[int, dict[str, Any]]) -> bool:
    """Whether this rank ended as if nothing had gone wrong, and was right to."""
    if fault.kind not in ("kill", "nan") and rank == fault.rank:
        return False
    logits, state = undisturbed(fault)
    try:
        torch.testing.assert_close(results[rank]["logits"], logits[rank], rtol=1e-8, atol=1e-8, equal_nan=True)
        torch.testing.assert_close(results[rank]["state"], state, rtol=1e-8, atol=1e-8, equal_nan=True)
        for other in results.values():  # the same bits on all ranks
            torch.testing.assert_close(results[rank]["state"], other["state"], rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return fault.kind != "nan" or bool(results[rank]["state"]["norm3.running_mean"].isnan().all())


def run(faults: int, seed: int, timeout: float, jobs: int, show: bool = True) -> list[Verdict]:
    """Judges ``faults`` faults, of each kind in turn."""
    torch.set_num_threads(1)
    kinds = list(KINDS)
    drawn = [Fault.draw(kinds[i % len(kinds)], seed + i) for i in range(faults)]
    verdicts = []
    with Ranks(timeout) as ranks, ThreadPoolExecutor(jobs) as pool:
        for verdict in pool.map(lambda fault: judge(fault, timeout, ranks), drawn):
            verdicts.append(verdict)
            if show:
                print(f"{len(verdicts):4}", line(verdict), flush=True)
                print(*verdict.told, sep="\n", end="\n" if verdict.told else "", flush=True)
    return verdicts


def line(verdict: Verdict) -> str:
    fault = verdict.fault
    slowest = f"{max(verdict.seconds):.1f} s" if verdict.seconds else "-"
    what = f"{fault.kind} {fault.how} rank {fault.rank} of {len(fault.rows)} step {fault.step} {fault.layer}"
    return f"{what:45} {dict(verdict.outcomes)} {slowest}"


def table(verdicts: list[Verdict]) -> str:
    """Surviving ranks by kind of fault and outcome; seconds from the fault to their errors."""
    head = ["kind", "faults", "ranks", *OUTCOMES, "median s", "max s"]
    rows = [head]
    for kind in (*KINDS, "total"):
        of_kind = [v for v in verdicts if kind in (v.fault.kind, "total")]
        outcomes: Counter[str] = sum((v.outcomes for v in of_kind), Counter())
        seconds = [s for v in of_kind for s in v.seconds]
        times = [f"{median(seconds):.2f}", f"{max(seconds):.2f}"] if seconds else ["-", "-"]
        rows.append([kind, *map(str, (len(of_kind), outcomes.total(), *(outcomes[o] for o in OUTCOMES))), *times])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def failed(verdicts: list[Verdict]) -> bool:
    return any(verdict.outcomes[bad] for verdict in verdicts for bad in BAD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds, of the process group")
    parser.add_argument("--jobs", type=int, default=2, help="training jobs at a time")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.timeout)
        return
    started = time.monotonic()
    verdicts = run(options.faults, options.seed, options.timeout, options.jobs)
    print(f"\nSurviving ranks by what became of them; torch {torch.__version__}, gloo, seed {options.seed}, ", end="")
    print(f"timeout {options.timeout:g} s, {time.monotonic() - started:.0f} s in all.\n\n{table(verdicts)}")
    sys.exit(failed(verdicts))


if __name__ == "__main__":
    main()
