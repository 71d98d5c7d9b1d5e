"""A plugin of pytest: each test's outcome is a line of the journal as soon as it is known."""

from __future__ import annotations

from typing import Any

from bench.gpu_check.journal import emit

LONGEST = 2000  # characters of a failure


def pytest_collection_finish(session: Any) -> None:
    emit("selected", tests=len(session.items))


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    why = "" if report.outcome == "passed" else str(report.longrepr)[-LONGEST:]
    name = report.nodeid.rsplit("/", 1)[-1]
    emit("test", test=name, outcome=report.outcome, seconds=round(report.duration, 2), why=why)
