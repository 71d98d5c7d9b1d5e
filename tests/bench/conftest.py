"""Workers inside this process: a worker of its own imports torch again, which takes seconds."""

from __future__ import annotations

import json

import pytest
import torch

from recurx.bench import runner
from recurx.bench.remote import WorkerFailed
from recurx.bench.worker import Worker


class WorkerHere:
    """What `Remote` is, without a process."""

    def __init__(self, log, **arguments):
        self.worker = Worker(**arguments)

    def send(self, do, **arguments):
        try:
            self.reply = json.loads(json.dumps(getattr(self.worker, do)(**arguments)))
        except Exception as error:
            self.reply = WorkerFailed(f"{type(error).__name__}: {error}")

    def receive(self, timeout):
        if isinstance(self.reply, WorkerFailed):
            raise self.reply
        return self.reply

    def ask(self, do, timeout=0.0, **arguments):
        self.send(do, **arguments)
        return self.receive(timeout)

    def close(self):
        pass

    kill = close


@pytest.fixture
def workers_here(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(runner, "Remote", WorkerHere)
    # Ceilings copy 128 MiB and multiply for seconds on a slow machine: not here.
    monkeypatch.setattr("recurx.measure.COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr("recurx.measure.LARGE", {"cpu": 64})
    monkeypatch.setattr("recurx.bench.ceilings.MOST_FLOPS", {"cpu": 1e6})
    monkeypatch.setattr("recurx.bench.runner.SAMPLE_SECONDS", 0.002)
    yield WorkerHere
    torch.set_num_threads(threads)
