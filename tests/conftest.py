import os
from importlib.metadata import entry_points

import pytest

pytest_plugins = ["pytester"]
# An installed syncnorm registers its plugin; a checkout that is only on PYTHONPATH does not.
if not entry_points(group="pytest11", name="syncnorm"):
    pytest_plugins.append("syncnorm.testing.plugin")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root"))
