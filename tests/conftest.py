import os
from importlib.metadata import entry_points

import pytest

pytest_plugins = ["pytester"]
# An installed syncnorm registers its plugin; a checkout that is only on PYTHONPATH does not.
if not entry_points(group="pytest11", name="syncnorm"):
    pytest_plugins.append("syncnorm.testing.plugin")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = {}
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        skipped["root"] = "needs root"
    if "release" not in config.getoption("markexpr"):
        skipped["release"] = "for releases: -m release"
    for item in items:
        for marker, reason in skipped.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
