# What: runs an unchanged torchrun script on the workers of a Ray cluster; Ray Train initializes the process group.
# When: on a Ray cluster; without one, Ray starts on this machine. --gpu gives each worker a GPU.
# How:  python launch/ray_train.py --workers 2 examples/train_ddp.py --checkpoint /shared/digits.pt
"""Runs a torchrun script with Ray Train; see the three lines above."""

import argparse
import os
import runpy
import sys
from pathlib import Path

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--gpu", action="store_true")
parser.add_argument("--storage", type=Path, help="folder for the results of Ray (default: ~/ray_results)")
parser.add_argument("--timeout", type=int, default=300, help="seconds that a rank waits for the others")
parser.add_argument(
    "script", type=Path, help="must be at the same path on all machines, as must be the current folder"
)
parser.add_argument("arguments", nargs=argparse.REMAINDER)


def train_loop_per_worker(config: dict) -> None:
    """Runs the script on each rank, with RANK, WORLD_SIZE and LOCAL_RANK in the environment, as under torchrun."""
    os.chdir(config["directory"])  # Ray starts each run in a new folder, where an earlier checkpoint is not found
    sys.argv = [config["script"], *config["arguments"]]
    runpy.run_path(config["script"], run_name="__main__")


if __name__ == "__main__":
    args = parser.parse_args()
    if not args.script.is_file():
        parser.error(f"there is no script {args.script}")
    script, here = str(args.script.resolve()), os.getcwd()
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"script": script, "arguments": args.arguments, "directory": here},
        torch_config=TorchConfig(backend="nccl" if args.gpu else "gloo", timeout_s=args.timeout),
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpu),
        run_config=RunConfig(storage_path=args.storage and str(args.storage.resolve())),
    )
    trainer.fit()
