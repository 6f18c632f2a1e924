"""The comparison from Python: ``syncnorm.compare.run(build, datasets, ...)``. See ``syncnorm.tools.compare``."""

from importlib.util import find_spec

if find_spec("accelerate") is None:
    raise ModuleNotFoundError('syncnorm.compare needs accelerate: pip install "syncnorm[cli]"', name="accelerate")

from syncnorm.tools.compare import *  # noqa: F403
from syncnorm.tools.compare import __all__ as __all__
