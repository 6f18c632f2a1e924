"""Builds the C library with the wheel and with ``pip install -e .``; a wheel without a compiler is pure Python.

``python hatch_build.py`` compiles it in the checkout.
"""

import runpy
import sysconfig
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # a checkout without the packages that build a wheel
    BuildHookInterface = object

ROOT = Path(__file__).parent


def build() -> str | None:
    """None, or why there is no library."""
    script = ROOT / "syncnorm/native/build.py"
    if not script.exists():  # an image of the dependencies alone
        return f"{script} does not exist"
    # By its path: `import syncnorm` needs torch, which is not there when a wheel is built.
    return runpy.run_path(str(script))["build"]()


class NativeBuildHook(BuildHookInterface):
    """Compiles before the wheel is packed, and marks it as one for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling."""
        reason = build()
        if reason is not None:
            self.app.display_warning(f"syncnorm without its native code, which makes it faster on CPUs: {reason}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["artifacts"].append("/syncnorm/native/syncnorm.native.so")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"  # neither Python's ABI nor torch's


if __name__ == "__main__":
    raise SystemExit(build())
