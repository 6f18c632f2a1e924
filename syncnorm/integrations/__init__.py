"""What other frameworks call: each module here imports its framework, and nothing else of syncnorm imports them.

- ``syncnorm.integrations.lightning.SyncNorm``: a plugin for Lightning's Trainer
- ``syncnorm.integrations.huggingface.SyncNorm``: a callback for the Trainer of Hugging Face Transformers
- ``syncnorm.integrations.scalars``: the monitor's numbers for Weights & Biases and MLflow
"""

from importlib import import_module
from types import ModuleType

__all__ = ["huggingface", "lightning", "scalars"]


def __getattr__(name: str) -> ModuleType:
    # Loaded at first use, because each needs a package that the others do not.
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def missing(error: ModuleNotFoundError, package: str, user: str) -> ModuleNotFoundError:
    """The error for ``package`` not being installed, which ``user`` imports; ``error`` if another one is missing."""
    if (error.name or "").partition(".")[0] != package:
        return error
    return ModuleNotFoundError(f"{user} needs {package}: pip install {package}", name=package)
