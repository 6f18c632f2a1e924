"""What a fault may change of a training job, and what has to become of the job's ranks then.

``fault_disagreements`` and ``fault_interruptions`` have the kinds: each is a subclass of :class:`Kind`.
"""

from dataclasses import dataclass

import torch.distributed as dist
from fault_jobs import LAYERS, STEPS, Fault, Job, Net, Trainer, build
from torch import Tensor, nn

import syncnorm

KINDS: dict[str, "Kind"] = {}  # by the names of their classes


@dataclass
class Told:
    """The error that ended a rank."""

    at: float  # time.monotonic()
    ours: bool  # a SyncNormError
    from_us: bool  # raised inside of the package
    text: str


class Kind:
    """Nothing goes wrong. Subclasses change a part of that, most of them on one rank, in one step, at one layer."""

    what = ""  # for the reader
    hows: tuple[str, ...] = ("",)  # variants
    steps, layers, ddp = range(STEPS), LAYERS, (True, False)  # to draw from
    outcomes = frozenset({"layer error", "DDP error"})  # that are right for a rank that survives
    lost = False  # the rank at fault does not survive
    helpers = 0  # processes beside those that train
    updates = True  # after each step; otherwise once, after all of them

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__.lower()] = cls()

    def right(self, fault: Fault, rank: int) -> frozenset[str]:
        """The outcomes that are right."""
        return self.outcomes

    def waits(self, fault: Fault) -> bool:
        """Whether the others cannot know before the group's timeout is over."""
        return False

    def clear(self, fault: Fault, rank: int, told: dict[int, Told]) -> bool:
        """Whether an error of the layer says what it has to."""
        return told[rank].ours and any(layer in told[rank].text for layer in LAYERS)

    # On all ranks, in this order.
    def store(self, job: Job) -> dist.Store:
        port = int((job.notes / "port").read_text())
        return dist.TCPStore("localhost", port, is_master=False, wait_for_workers=False)

    def help(self, job: Job) -> None:
        """What a helper does."""

    def norm(self, fault: Fault) -> type[nn.Module]:
        """The class of the norms."""
        return nn.BatchNorm2d

    def models(self, job: Job) -> list[Net]:
        """To be trained in turn; the group is given only where it is not the default one."""
        group = job.group if self.helpers else None
        return [syncnorm.convert(build(job.fault, self.norm(job.fault)), process_group=group)]

    def train(self, job: Job, trainers: list[Trainer]) -> None:
        job.loop(trainers)

    def batch(self, fault: Fault, step: int) -> tuple[list[Tensor], list[Tensor]]:
        """Images and classes by rank."""
        return fault.batch(step)

    def goes_on(self, fault: Fault, error: BaseException) -> bool:
        """Whether the training loop catches ``error`` and goes on with the next batch."""
        return False

    # In the step of the fault: on its rank, there in its layer, in that layer on the others, and undisturbed.
    def step(self, job: Job, trainers: list[Trainer], x: Tensor, classes: Tensor) -> None:
        for trainer in trainers:
            trainer.step(x, classes)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x)

    def others_in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x)

    def alone(self, fault: Fault, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x)
