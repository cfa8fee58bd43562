"""A plugin for tests that take several runs (``-p passed --passed FILE``): what passed in one, the next leaves out."""

from pathlib import Path

import pytest


class LeftOut:
    """Leaves out tests by name."""

    def __init__(self, names):
        self.names = set(names)

    def pytest_collection_modifyitems(self, config, items):
        """What is left of the tests that were found."""
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.names])
        items[:] = [item for item in items if item.nodeid not in self.names]


class Passed:
    """The file: a test's name a line, those that passed before and those that do now."""

    def __init__(self, path):
        self.path = path
        self.before = path.read_text().splitlines() if path.exists() else []
        self.called = set()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        """Tells xdist's processes; the one that takes a crashed one's place must leave out what that one did."""
        node.workerinput["passed"] = self.before

    def pytest_runtest_logreport(self, report):
        """Adds a test."""
        if report.when == "call" and report.passed:
            self.called.add(report.nodeid)
        if report.when == "teardown" and report.passed and report.nodeid in self.called:
            with self.path.open("a") as file:
                file.write(report.nodeid + "\n")

    def pytest_sessionfinish(self, session, exitstatus):
        """Where nothing is left to test, nothing failed."""
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.before:
            session.exitstatus = pytest.ExitCode.OK


def pytest_addoption(parser):
    """The option."""
    parser.addoption("--passed", metavar="FILE", help="leave out the tests that FILE names, and add those that pass")


def pytest_configure(config):
    """Follows it."""
    path = config.getoption("--passed")
    if hasattr(config, "workerinput"):  # its reports go to the first process
        config.pluginmanager.register(LeftOut(config.workerinput["passed"]))
    elif path is not None:
        passed = Passed(Path(path))
        config.pluginmanager.register(passed)
        config.pluginmanager.register(LeftOut(passed.before))
