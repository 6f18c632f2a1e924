"""``python -m syncnorm.native`` compiles the library where the package is installed."""

from syncnorm.native.build import build

raise SystemExit(build())
