"""The runner's side of a worker process."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import recurx
from recurx.errors import RecurxError


class WorkerFailed(RecurxError, RuntimeError):
    """A worker gave an error, died, or took too long; the message says which."""


class Remote:
    """A worker process for one variant; commands are methods of `worker.Worker`.

    In a session of its own, so that Ctrl-C reaches the runner alone, which then ends its workers.
    """

    def __init__(self, log: Any, **arguments: Any) -> None:
        self.name = str(arguments["variant"])
        self._buffer = b""
        root = str(Path(recurx.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        threads = str(arguments["threads"])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "recurx.bench.worker", json.dumps(arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads},
        )  # fmt: skip

    def send(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died: `receive` tells why
            self.process.stdin.write((json.dumps({"do": do, **arguments}) + "\n").encode())
            self.process.stdin.flush()

    def receive(self, timeout: float) -> dict[str, Any]:
        """The reply to the last command.

        Raises:
            WorkerFailed: an error, an exit, or no reply within `timeout` seconds.
        """
        line = self._line(timeout)
        if line is None:
            self.kill()
            raise WorkerFailed(f"no answer within {timeout:.0f} s")
        if not line:
            raise WorkerFailed(f"its process ended, exit {self.process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerFailed(reply["error"])
        return reply

    def ask(self, do: str, timeout: float = 600.0, **arguments: Any) -> dict[str, Any]:
        self.send(do, **arguments)
        return self.receive(timeout)

    def _line(self, timeout: float) -> bytes | None:
        """One line; b"" at the end of the stream; None when the time is over."""
        assert self.process.stdout is not None
        end = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, end - time.monotonic())):
                    return None
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                if not chunk:
                    return b""
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def close(self) -> None:
        """Let it end by itself."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
