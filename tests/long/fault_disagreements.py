"""Faults in which a rank does something different from the other ranks."""

import copy
import pickle
import queue
import struct
import threading
import time

import torch
from fault_jobs import CHANNELS, LAYERS, Fault, Job, Net, Trainer, build
from fault_kinds import ErrorReport, FaultKind
from torch import Tensor, nn

import syncnorm
from syncnorm import functional
from syncnorm.comm import frames


class Skip(FaultKind):
    description = "one forward skips a norm"
    outcomes = frozenset({"layer error"})

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        job.mark_fault()
        return x


class Reorder(FaultKind):
    description = "one forward calls two norms in the other order"
    outcomes = frozenset({"layer error"})

    def step(self, job: Job, trainers: list[Trainer], x: Tensor, classes: Tensor) -> None:
        job.mark_fault()
        norms = trainers[0].model._modules  # DDP has registered them already
        norms[job.fault.layer], norms[job.fault.other] = norms[job.fault.other], norms[job.fault.layer]
        super().step(job, trainers, x, classes)


class Widen(FaultKind):
    description = "in one forward a norm has a different width"
    variants = ("2", "40")  # factor for the number of channels
    outcomes = frozenset({"layer error"})

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        job.mark_fault()
        # The parameters that DDP knows stay unchanged, so that only the layer disagrees and no gradient bucket.
        wide = x.repeat(1, int(job.fault.variant), 1, 1)
        y = functional.sync_batch_norm(wide, None, None, training=True, layer_name=job.fault.layer)
        return y[:, :CHANNELS]


class Extra(FaultKind):
    description = "an additional training forward of the model or of DDP"
    variants = ("model before", "model after", "DDP before", "DDP after")  # relative to the step
    ddp = (True,)

    def waits_for_timeout(self, fault: Fault) -> bool:
        return True

    def expected(self, fault: Fault, rank: int) -> frozenset[str]:
        return self.outcomes | ({"equal"} if rank != fault.rank else set())

    def step(self, job: Job, trainers: list[Trainer], x: Tensor, classes: Tensor) -> None:
        for when in ("before", "after"):
            if when in job.fault.variant:
                job.mark_fault()
                (trainers[0].model if "model" in job.fault.variant else trainers[0].net)(x)
            if when == "before":
                super().step(job, trainers, x, classes)


class Nan(FaultKind):
    description = "one value of the input is NaN: no error, but the same NaN on all ranks"
    outcomes = frozenset({"equal"})

    def batch(self, fault: Fault, step: int) -> tuple[list[Tensor], list[Tensor]]:
        inputs, classes = super().batch(fault, step)
        if step == fault.step:
            inputs[fault.rank][0, 1, 2, 3] = torch.nan
        return inputs, classes

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        job.mark_fault()
        return norm(x)


class Models(FaultKind):
    description = "two models of one architecture, trained in a different order on one rank"
    variants = ("built", "copied", "loaded", "of layers")
    outcomes = frozenset({"layer error"})

    def is_clear(self, fault: Fault, rank: int, errors: dict[int, ErrorReport]) -> bool:
        return errors[rank].is_syncnorm_error and "called different layers" in errors[rank].text

    def models(self, job: Job) -> list[Net]:
        if job.fault.variant == "of layers":
            return [build(job.fault, syncnorm.SyncBatchNorm2d) for _ in range(2)]
        (model,) = super().models(job)
        if job.fault.variant == "copied":
            return [model, copy.deepcopy(model)]
        if job.fault.variant == "loaded":
            file = pickle.dumps(model)
            return [pickle.loads(file), pickle.loads(file)]
        return [model, *super().models(job)]

    def step(self, job: Job, trainers: list[Trainer], x: Tensor, classes: Tensor) -> None:
        job.mark_fault()
        super().step(job, trainers[::-1], x, classes)


class Thread(FaultKind):
    description = "two threads of each rank train two models over one group"
    variants = ("at once", "shifted", "in turn")
    ddp = (False,)  # the collectives of two DDP instances would share a group as well
    updates = False

    def expected(self, fault: Fault, rank: int) -> frozenset[str]:
        return frozenset({"equal"} if fault.variant == "in turn" else {"layer error", "equal"})

    def is_clear(self, fault: Fault, rank: int, errors: dict[int, ErrorReport]) -> bool:
        texts = ("Only one thread may run", "was complete", "called different layers")
        return errors[rank].is_syncnorm_error and any(text in errors[rank].text for text in texts)

    def models(self, job: Job) -> list[Net]:
        return super().models(job) + super().models(job)

    def train(self, job: Job, trainers: list[Trainer]) -> None:
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def run(trainer: Trainer) -> None:
            try:
                job.loop([trainer])
            except BaseException as error:
                ended.put(error)
            else:
                ended.put(None)

        job.mark_fault()
        threads = [threading.Thread(target=run, args=(trainer,)) for trainer in trainers]
        for thread in threads:
            thread.start()
            if job.fault.variant == "in turn":
                thread.join()
            time.sleep(0.05 * job.fault.delay * (job.fault.variant == "shifted"))
        errors = [ended.get() for _ in threads]
        for error in errors:
            if error is not None:
                raise error
        for trainer in trainers:
            trainer.update()


class Version(FaultKind):
    description = "one rank has a different wire format"
    variants = ("version", "header")
    steps, layers = range(1), LAYERS[:1]
    outcomes = frozenset({"layer error"})

    def is_clear(self, fault: Fault, rank: int, errors: dict[int, ErrorReport]) -> bool:
        texts = ("incompatible versions of syncnorm", f"rank {fault.rank}: frames of version")
        return errors[rank].is_syncnorm_error and all(text in errors[rank].text for text in texts)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        if job.fault.variant == "version":
            frames._VERSION += 1
        else:
            frames._HEADER = struct.Struct("<6q")
        job.mark_fault()
        return norm(x)
