"""The training job in which a fault happens, as one rank runs it, and the same training in one process without it.

The fault itself is defined by a ``FaultKind`` of ``fault_kinds``.
"""

import json
import random
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm

if TYPE_CHECKING:
    from fault_kinds import FaultKind

STEPS, CHANNELS = 4, 8
LAYERS = ("norm1", "norm2", "norm3")


@dataclass(frozen=True)
class Fault:
    """A job and its fault."""

    kind: str
    seed: int
    rows: tuple[int, ...]  # samples of each rank
    rank: int
    step: int
    layer: str
    other: str  # the layer to swap it with
    variant: str  # one of the variants of the kind
    delay: float  # 0 to 1, which each kind scales to seconds
    ddp: bool  # otherwise gradients are averaged by one all_reduce
    broadcast_buffers: bool  # DDP's option

    @classmethod
    def draw(cls, name: str, kind: "FaultKind", seed: int) -> "Fault":
        """A random fault of ``kind``."""
        rng = random.Random(f"{name} {seed}")
        rows = tuple(rng.randint(1, 4) for _ in range(rng.choice(kind.sizes)))
        layer = rng.choice(kind.layers)
        other = rng.choice([name for name in LAYERS if name != layer])
        return cls(
            name, seed, rows, rng.randrange(len(rows)), rng.choice(kind.steps), layer, other,
            rng.choice(kind.variants), rng.random(), rng.choice(kind.ddp), rng.random() < 0.5,
        )  # fmt: skip

    def batch(self, step: int) -> tuple[list[Tensor], list[Tensor]]:
        """Images and classes of each rank."""
        generator = torch.Generator().manual_seed(self.seed * STEPS + step)
        x = torch.randn(sum(self.rows), CHANNELS, 6, 6, generator=generator, dtype=torch.float64)
        classes = torch.randint(0, 5, (sum(self.rows),), generator=generator)
        return list(x.split(self.rows)), list(classes.split(self.rows))


class Net(nn.Module):
    """Three norms of one width; the first one normalizes the images themselves."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm1 = norm(CHANNELS)
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3)
        self.norm2 = norm(CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3)
        self.norm3 = norm(CHANNELS)
        self.head = nn.Linear(CHANNELS, 5)
        self.at: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {}  # called instead of the norm of that name

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.norm("norm1", x))
        x = self.conv2(self.norm("norm2", x).relu())
        return self.head(self.norm("norm3", x).relu().mean((2, 3)))

    def norm(self, name: str, x: Tensor) -> Tensor:
        norm = getattr(self, name)
        return self.at[name](norm, x) if name in self.at else norm(x)


_seeding = threading.Lock()  # all threads share torch's generator, and several threads judge jobs


def build(fault: Fault, norm: type[nn.Module] = nn.BatchNorm2d) -> Net:
    """A net with the same initial weights at each call."""
    with _seeding, torch.random.fork_rng():
        torch.manual_seed(fault.seed)
        return Net(norm).double()


class Trainer:
    """A model and its optimizer. Without a group it trains on the whole batch in one process."""

    def __init__(self, fault: Fault, model: Net, group: dist.ProcessGroup | None, updates: bool) -> None:
        self.fault, self.model, self.group, self.updates = fault, model, group, updates
        self.net: nn.Module = model
        self.ddp = group is not None and fault.ddp
        if self.ddp:
            self.net = DistributedDataParallel(model, process_group=group, broadcast_buffers=fault.broadcast_buffers)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        self.logits = torch.empty(0)

    def step(self, x: Tensor, classes: Tensor) -> None:
        if self.updates:
            self.optimizer.zero_grad()
        logits = self.net(x.requires_grad_())  # so that the first norm computes a complete backward
        loss = F.cross_entropy(logits, classes, reduction="sum") / sum(self.fault.rows)
        (loss * (self.group.size() if self.group else 1)).backward()  # gradients are averaged over the ranks
        if self.updates:
            self.update()
        self.logits = logits.detach()

    def update(self) -> None:
        if self.group is not None and not self.ddp:
            gradients = [p.grad for p in self.model.parameters()]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat, group=self.group)
            means = flat.div_(self.group.size()).split([g.numel() for g in gradients])
            for g, mean in zip(gradients, means, strict=True):
                g.copy_(mean.view_as(g))
        self.optimizer.step()

    def result(self) -> dict[str, Any]:
        return {"logits": self.logits, "state": {k: v.detach() for k, v in self.model.state_dict().items()}}


class Job:
    """A job as one rank runs it."""

    def __init__(self, fault: Fault, kind: "FaultKind", rank: int, notes: Path, timeout: float) -> None:
        self.fault, self.kind, self.rank, self.notes, self.timeout = fault, kind, rank, notes, timeout
        self.group: dist.ProcessGroup | None = None

    @property
    def at_fault(self) -> bool:
        """Whether the fault happens on this rank."""
        return self.rank == self.fault.rank

    def mark_fault(self) -> None:
        """Records when the fault happened. The parent process has the same clock."""
        if not (self.notes / "happened").exists():
            write_note(self.notes / "happened", str(time.monotonic()))

    def connect(self) -> None:
        ranks = len(self.fault.rows)
        world_size, timeout = ranks + self.kind.helpers, timedelta(seconds=self.timeout)
        store = self.kind.store(self)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=world_size, timeout=timeout)
        self.group = dist.new_group(range(ranks)) if self.kind.helpers else dist.group.WORLD

    def train(self) -> list[dict[str, Any]]:
        """Trains, and returns the result of each model."""
        self.connect()
        if self.rank == len(self.fault.rows):
            self.kind.help(self)
            return []
        trainers = [Trainer(self.fault, m, self.group, self.kind.updates) for m in self.kind.models(self)]
        self.kind.train(self, trainers)
        return [trainer.result() for trainer in trainers]

    def loop(self, trainers: list[Trainer]) -> None:
        """The training loop."""
        kind, fault = self.kind, self.fault
        in_layer = kind.in_layer if self.at_fault else kind.others_in_layer
        for step in range(STEPS):
            x, classes = (part[self.rank] for part in kind.batch(fault, step))
            now = step == fault.step
            for trainer in trainers:
                trainer.model.at = {fault.layer: partial(in_layer, self)} if now else {}
            try:
                if now and self.at_fault:
                    kind.step(self, trainers, x, classes)
                else:
                    for trainer in trainers:
                        trainer.step(x, classes)
            except BaseException as error:
                if not kind.continues_after(fault, error):
                    raise


class LeftOut(Exception):
    """Raised to skip the rest of a step."""


def reference(kind: "FaultKind", fault: Fault) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The result of a single process: the logits of the last step by rank, and the state after it."""
    trainer = Trainer(fault, build(fault, kind.norm(fault)), None, kind.updates)
    for step in range(STEPS):
        trainer.model.at = {fault.layer: partial(kind.in_reference, fault)} if step == fault.step else {}
        with suppress(LeftOut):
            trainer.step(*(torch.cat(part) for part in kind.batch(fault, step)))
    if not kind.updates:
        trainer.update()
    result = trainer.result()
    return list(result["logits"].split(fault.rows)), result["state"]


def rank_process(job: Job) -> None:
    """The program of one rank. An error ends it as it ends a user's script, with a traceback."""
    torch.set_num_threads(1)
    try:
        result = job.train()
    except (Exception, KeyboardInterrupt) as error:
        files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        report = {
            "at": time.monotonic(),
            "is_syncnorm_error": isinstance(error, syncnorm.SyncNormError),
            "raised_in_syncnorm": any(Path(syncnorm.__file__).parent in file.parents for file in files),
            "text": str(error),
        }
        write_note(job.notes / f"error{job.rank}", json.dumps(report))
        raise
    torch.save(result, job.notes / f"saving{job.rank}")  # a timer may kill this process meanwhile
    (job.notes / f"saving{job.rank}").rename(job.notes / f"result{job.rank}")
    dist.destroy_process_group()


def write_note(path: Path, text: str) -> None:
    """Writes a file atomically."""
    # Two ranks may write the same file at once.
    new = path.with_suffix(f".{time.monotonic_ns()}.{threading.get_ident()}")
    new.write_text(text)
    new.rename(path)
