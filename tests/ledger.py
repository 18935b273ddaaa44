"""A ledger of the tests: how each ended is written at once. A run that is cut off loses nothing, and the next one leaves out what passed."""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--ledger", help="a file; each test adds a line of JSON, and those that passed before are left out"
    )


def _ledger(config):
    return Path(config.getoption("ledger")) if config.getoption("ledger") else None


def pytest_collection_modifyitems(config, items):
    ledger = _ledger(config)
    if ledger is None or not ledger.exists():
        return
    records = [json.loads(line) for line in ledger.read_text().splitlines()]
    passed = {record["test"] for record in records if record["outcome"] == "passed"}
    before = [item for item in items if item.nodeid in passed]
    items[:] = [item for item in items if item.nodeid not in passed]
    config.hook.pytest_deselected(items=before)


class Ledger:
    """Writes the ledger."""

    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            record = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            if report.failed:
                record["why"] = report.longreprtext[-4000:]
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.path.exists():
            session.exitstatus = pytest.ExitCode.OK  # none is left, because all passed before


def pytest_configure(config):
    ledger = _ledger(config)
    if ledger is not None and not hasattr(config, "workerinput"):  # xdist's workers report to the process that writes
        config.pluginmanager.register(Ledger(ledger))
