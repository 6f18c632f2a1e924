from importlib.metadata import entry_points

pytest_plugins = ["pytester"]
# An installed syncnorm brings its plugin along; a plain checkout on PYTHONPATH does not.
if not entry_points(group="pytest11", name="syncnorm"):
    pytest_plugins.append("syncnorm.testing.plugin")
