"""Ultralytics YOLO: two callbacks that convert the model before training and revert it afterwards.

What it shows: ``on_pretrain_routine_end`` comes after the copy of averaged weights (EMA) was made, which is what
               checkpoints and validation use: they have plain batch norms at all times. Ultralytics' own launcher
               takes callbacks along to its ranks, but starts ranks on GPUs only, hence the trainer for CPUs.
How to start:  torchrun --nproc-per-node 2 examples/frameworks/ultralytics_yolo.py
               With GPUs, without torchrun: ``device=[0, 1]`` and without ``trainer=``.
Needs: ultralytics. The model is built from its YAML file; nothing is downloaded.
"""

import os

os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from recipe import report
from torch.nn.parallel import DistributedDataParallel
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer

import syncnorm


def convert(trainer: BaseTrainer) -> None:
    """On all ranks: the model in training, not ``trainer.ema``."""
    syncnorm.convert(trainer.model)


def revert(trainer: BaseTrainer) -> None:
    """On rank 0, the only one for which ultralytics calls ``on_train_end``."""
    syncnorm.revert(trainer.model)


class CPUTrainer(DetectionTrainer):
    """A rank of torchrun on a CPU."""

    def _setup_train(self) -> None:
        self.batch_size //= dist.get_world_size()
        super()._setup_train()
        self.world_size = dist.get_world_size()  # 0 until here: otherwise it would be DDP on device_ids=[None]
        self.model = DistributedDataParallel(self.model)

    def final_eval(self) -> None:
        """Left out: a rank validates the saved model on a GPU."""


def write_squares(folder: Path, count: int) -> None:
    """Images with a bright square each, their boxes, and the file that describes them to ultralytics."""
    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = random.integers(0, 100, (64, 64, 3), dtype=np.uint8)
        x, y, side = *random.integers(0, 40, 2), 24
        image[y : y + side, x : x + side] = 255
        cv2.imwrite(str(folder / "images" / f"{i}.png"), image)
        box = (x + side / 2) / 64, (y + side / 2) / 64, side / 64, side / 64
        (folder / "labels" / f"{i}.txt").write_text(f"0 {' '.join(map(str, box))}")
    (folder / "squares.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [square]")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder = Path("squares").absolute()  # ranks have one folder: ultralytics compares what they find in it
    if dist.get_rank() == 0:
        write_squares(folder, count=16)
    dist.barrier()
    model = YOLO("yolo11n.yaml")
    model.add_callback("on_pretrain_routine_end", convert)
    model.add_callback("on_train_epoch_end", lambda trainer: report(trainer.model, [trainer.loss]))
    model.add_callback("on_train_end", revert)
    small = {"imgsz": 64, "batch": 8, "nbs": 8, "epochs": 1, "device": "cpu", "amp": False, "plots": False}
    model.train(trainer=CPUTrainer, data=folder / "squares.yaml", project=folder, **small)
    if dist.get_rank() == 0:
        saved = torch.load(model.trainer.last, weights_only=False)["ema"]
        print("saved with", *sorted({layer.type for layer in syncnorm.describe(saved)}), flush=True)
    dist.destroy_process_group()
