"""Faults of a rank that does something else than the others, on its own or by mistake."""

import copy
import pickle
import queue
import struct
import threading
import time

import torch
from fault_jobs import CHANNELS, LAYERS, Fault, Job, Net, Trainer, build
from fault_kinds import Kind, Told
from torch import Tensor, nn

import syncnorm
from syncnorm import functional
from syncnorm.comm import frames


class Skip(Kind):
    what = "one forward leaves a norm out"
    outcomes = frozenset({"layer error"})

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        job.happens()
        return x


class Reorder(Kind):
    what = "one forward calls two norms in the other order"
    outcomes = frozenset({"layer error"})

    def step(self, job: Job, trainers: list[Trainer], x: Tensor, classes: Tensor) -> None:
        job.happens()
        norms = trainers[0].model._modules  # DDP has seen them already
        norms[job.fault.layer], norms[job.fault.other] = norms[job.fault.other], norms[job.fault.layer]
        super().step(job, trainers, x, classes)


class Widen(Kind):
    what = "in one forward a norm has another width"
    hows = ("2", "40")  # times as many channels
    outcomes = frozenset({"layer error"})

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        job.happens()
        # What DDP knows of stays as it is, so that no gradient bucket has another size: the layer disagrees.
        wide = x.repeat(1, int(job.fault.how), 1, 1)
        y = functional.sync_batch_norm(wide, None, None, training=True, layer=job.fault.layer)
        return y[:, :CHANNELS]


class Extra(Kind):
    what = "one more training forward, of the model or of DDP"
    hows = ("model before", "model after", "DDP before", "DDP after")  # the step
    ddp = (True,)

    def waits(self, fault: Fault) -> bool:
        return True

    def right(self, fault: Fault, rank: int) -> frozenset[str]:
        return self.outcomes | ({"equal"} if rank != fault.rank else set())

    def step(self, job: Job, trainers: list[Trainer], x: Tensor, classes: Tensor) -> None:
        for when in ("before", "after"):
            if when in job.fault.how:
                job.happens()
                (trainers[0].model if "model" in job.fault.how else trainers[0].net)(x)
            if when == "before":
                super().step(job, trainers, x, classes)


class Nan(Kind):
    what = "one value of the input is NaN: no error, but NaN everywhere alike"
    outcomes = frozenset({"equal"})

    def batch(self, fault: Fault, step: int) -> tuple[list[Tensor], list[Tensor]]:
        inputs, classes = super().batch(fault, step)
        if step == fault.step:
            inputs[fault.rank][0, 1, 2, 3] = torch.nan
        return inputs, classes

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        job.happens()
        return norm(x)


class Models(Kind):
    what = "two models of one architecture, trained in the other order on one rank"
    hows = ("built", "copied", "loaded", "of layers")
    outcomes = frozenset({"layer error"})

    def clear(self, fault: Fault, rank: int, told: dict[int, Told]) -> bool:
        return told[rank].ours and "called different layers" in told[rank].text

    def models(self, job: Job) -> list[Net]:
        if job.fault.how == "of layers":
            return [build(job.fault, syncnorm.SyncBatchNorm2d) for _ in range(2)]
        (model,) = super().models(job)
        if job.fault.how == "copied":
            return [model, copy.deepcopy(model)]
        if job.fault.how == "loaded":
            file = pickle.dumps(model)
            return [pickle.loads(file), pickle.loads(file)]
        return [model, *super().models(job)]

    def step(self, job: Job, trainers: list[Trainer], x: Tensor, classes: Tensor) -> None:
        job.happens()
        super().step(job, trainers[::-1], x, classes)


class Thread(Kind):
    what = "two threads of each rank train two models over one group"
    hows = ("at once", "shifted", "in turn")
    ddp = (False,)  # its collectives would be those of one group as well
    updates = False

    def right(self, fault: Fault, rank: int) -> frozenset[str]:
        return frozenset({"equal"} if fault.how == "in turn" else {"layer error", "equal"})

    def clear(self, fault: Fault, rank: int, told: dict[int, Told]) -> bool:
        says = ("Only one thread may run", "was complete", "called different layers")
        return told[rank].ours and any(text in told[rank].text for text in says)

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

        job.happens()
        threads = [threading.Thread(target=run, args=(trainer,)) for trainer in trainers]
        for thread in threads:
            thread.start()
            if job.fault.how == "in turn":
                thread.join()
            time.sleep(0.05 * job.fault.delay * (job.fault.how == "shifted"))
        errors = [ended.get() for _ in threads]
        for error in errors:
            if error is not None:
                raise error
        for trainer in trainers:
            trainer.update()


class Version(Kind):
    what = "one rank has other frames"
    hows = ("version", "header")
    steps, layers = range(1), LAYERS[:1]
    outcomes = frozenset({"layer error"})

    def clear(self, fault: Fault, rank: int, told: dict[int, Told]) -> bool:
        says = ("incompatible versions of syncnorm", f"rank {fault.rank}: frames of version")
        return told[rank].ours and all(text in told[rank].text for text in says)

    def in_layer(self, job: Job, norm: nn.Module, x: Tensor) -> Tensor:
        if job.fault.how == "version":
            frames._VERSION += 1
        else:
            frames._HEADER = struct.Struct("<6q")
        job.happens()
        return norm(x)
