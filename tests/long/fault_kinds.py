"""What a fault may change in a training job, and the outcomes that are correct for the ranks of that job.

``fault_disagreements``, ``fault_interruptions`` and ``fault_transports`` define the kinds, each as a subclass of
:class:`FaultKind`.
"""

from dataclasses import dataclass

import torch.distributed as dist
from fault_jobs import LAYERS, STEPS, Fault, Job, Net, Trainer, build
from torch import Tensor, nn

import syncnorm

KINDS: dict[str, "FaultKind"] = {}  # by the lowercase names of their classes


@dataclass
class ErrorReport:
    """The error that ended a rank."""

    at: float  # by time.monotonic
    is_syncnorm_error: bool
    raised_in_syncnorm: bool  # from a function of the package
    text: str


class FaultKind:
    """A job without a fault. Most subclasses change what one rank does in one step at one layer."""

    description = ""  # for the help text
    variants: tuple[str, ...] = ("",)
    steps, layers, ddp = range(STEPS), LAYERS, (True, False)  # to draw from
    sizes: tuple[int, ...] = (2, 3)  # numbers of ranks to draw from
    outcomes = frozenset({"layer error", "DDP error"})  # correct ones for a rank that survives
    dies = False  # whether the rank at fault is killed or stopped
    helpers = 0  # additional processes that do not train
    updates = True  # whether the optimizer steps after each step, or once after all of them

    def __init_subclass__(cls) -> None:
        if cls.description:
            KINDS[cls.__name__.lower()] = cls()

    def expected(self, fault: Fault, rank: int) -> frozenset[str]:
        """The outcomes that are correct for ``rank``."""
        return self.outcomes

    def waits_for_timeout(self, fault: Fault) -> bool:
        """Whether the other ranks can notice the fault only when the timeout of the group has passed."""
        return False

    def is_clear(self, fault: Fault, rank: int, errors: dict[int, ErrorReport]) -> bool:
        """Whether the error of ``rank`` is one of the layer with a sufficient message."""
        return errors[rank].is_syncnorm_error and any(layer in errors[rank].text for layer in LAYERS)

    # Called on all ranks, in this order.
    def store(self, job: Job) -> dist.Store:
        port = int((job.notes / "port").read_text())
        return dist.TCPStore("localhost", port, is_master=False, wait_for_workers=False)

    def help(self, job: Job) -> None:
        """The program of a helper."""

    def norm(self, fault: Fault) -> type[nn.Module]:
        """The class of the norms."""
        return nn.BatchNorm2d

    def models(self, job: Job) -> list[Net]:
        """The models to train in turn. Their group is passed only if it is not the default one."""
        group = job.group if self.helpers else None
        return [syncnorm.convert(build(job.fault, self.norm(job.fault)), process_group=group)]

    def train(self, job: Job, trainers: list[Trainer]) -> None:
        job.loop(trainers)

    def batch(self, fault: Fault, step: int) -> tuple[list[Tensor], list[Tensor]]:
        """Images and classes of each rank."""
        return fault.batch(step)

    def continues_after(self, fault: Fault, error: BaseException) -> bool:
        """Whether the training loop catches ``error`` and continues with the next batch."""
        return False

    # Called in the step of the fault: for the step and in the layer on the rank at fault, in the layer on the other
    # ranks, and in the layer of the reference.
    def step(self, job: Job, trainers: list[Trainer], x: Tensor, classes: Tensor) -> None:
        for trainer in trainers:
            trainer.step(x, classes)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x)

    def others_in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x)

    def in_reference(self, fault: Fault, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x)
