"""Comparisons that earlier versions of syncnorm wrote, in the fields of today's records."""

from __future__ import annotations

from typing import Any


def from_version_2(data: dict[str, Any]) -> dict[str, Any]:
    """A comparison of schema version 2 as one of version 3; what it did not record stays empty."""
    is_loss = data["task"]["metric"] == "loss"
    metric = {"name": "accuracy", "higher_is_better": True, "share": True, "units": "samples"}
    if is_loss:
        metric = {"name": "loss", "higher_is_better": False, "share": False, "units": "batches"}
    return {
        **data,
        "schema_version": 3,
        "settings": {**data["settings"], "eval_batch": 256},
        "task": {**data["task"], "metric": metric},
        "arms": [_arm_of_version_2(arm, is_loss) for arm in data["arms"]],
    }


def _arm_of_version_2(arm: dict[str, Any], is_loss: bool) -> dict[str, Any]:
    arm, step = dict(arm), None
    seconds, wait = arm.pop("step_seconds"), arm.pop("wait")
    arm.pop("samples_per_second")
    if seconds:
        # The waiting was measured in other steps than the median, so its share of them is what can be kept.
        scale = seconds / wait["step_seconds"] if wait and wait["step_seconds"] else None
        step = {
            "seconds": seconds,
            "norm_seconds": scale and scale * wait["norm_seconds"],
            "ddp_seconds": scale and scale * wait["ddp_seconds"],
        }
    seeds = []
    for run in map(dict, arm["seeds"]):
        accuracy, accuracies = run.pop("test_accuracy"), run.pop("test_accuracies")
        run["test_metric"] = run["test_loss"] if is_loss else accuracy
        run["test_metrics"] = run["test_losses"] if is_loss else accuracies
        seeds.append(run)
    return {**arm, "seeds": seeds, "step": step}
