"""The numbers of ``syncnorm.monitor`` for experiment trackers; its argument ``scalars`` is called with each of them.

TensorBoard needs nothing from here: ``monitor(model, scalars=writer.add_scalar)``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from syncnorm.integrations import missing
from syncnorm.monitor.scalars import LAST_NAME, WriteScalar

if TYPE_CHECKING:
    import wandb

__all__ = ["to_mlflow", "to_wandb"]

_STEP = "syncnorm/step"


def to_wandb(run: wandb.Run) -> WriteScalar:
    """For Weights & Biases: one row of the history for each sampled step.

    The x-axis of the charts is ``syncnorm/step``, so that your own ``run.log`` may count steps differently.

    Args:
        run: what ``wandb.init`` returned.

    Example:
        ``monitor(model, scalars=to_wandb(run) if rank == 0 else None)``
    """
    run.define_metric("syncnorm/*", step_metric=_STEP)

    def write(name: str, value: float, step: int) -> None:
        run.log({name: value, _STEP: step}, commit=name == LAST_NAME)

    return write


def to_mlflow() -> WriteScalar:
    """For MLflow: metrics of the active run, written in the background; the end of the run waits for them.

    A layer's name may contain characters that MLflow does not allow, which become underscores.

    Raises:
        ModuleNotFoundError: MLflow is not installed.

    Example:
        ``monitor(model, scalars=to_mlflow() if rank == 0 else None)``
    """
    try:
        import mlflow
    except ModuleNotFoundError as error:
        raise missing(error, "mlflow", f"{__name__}.to_mlflow") from None

    def write(name: str, value: float, step: int) -> None:
        # Otherwise each number is a request that this rank, and so all others, wait for.
        mlflow.log_metric(re.sub(r"[^\w\-. /]", "_", name), value, step=step, synchronous=False)

    return write
