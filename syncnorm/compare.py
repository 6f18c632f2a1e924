"""The comparison from Python: ``syncnorm.compare.run(build, datasets, ...)``. See ``syncnorm.tools.compare``."""

from syncnorm.tools.compare import *  # noqa: F403
from syncnorm.tools.compare import __all__ as __all__
