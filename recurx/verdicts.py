"""Which backend was faster: verdicts of measurements, kept for the process and in a cache folder.

One small JSON file a verdict, named by the hash of its key; the key lies in the file and is
compared, so that a file of another machine, version or problem is never taken for this one's. Disk
is a convenience: what cannot be read or written is passed over in silence.

    RECURX_CACHE=0       nothing is read or written
    RECURX_CACHE=FOLDER  files lie in FOLDER/verdicts-v2
    (else)               in $XDG_CACHE_HOME/recurx/verdicts-v2, or ~/.cache/recurx/verdicts-v2
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recurx.atomic import write_json
from recurx.measure import engine_isa, processor
from recurx.problem import Problem, encode

FORMAT = "verdicts-v2"  # another meaning takes another folder; in v1 backends had no kinds of plan
LARGEST_FILE = 1 << 16  # bytes; ours have about two thousand

# What reading something that is no verdict may raise; the last one: a number without end.
_NO_VERDICT = (ValueError, TypeError, KeyError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Verdict:
    """What was measured for one half of a recursion.

    Args:
        chosen: name of what runs it, for `backends.get`: "eager", "triton/library".
        seconds: (such a name, seconds of the same calls), the best of several runs; empty for a
            choice that was stored without (`pin`).
        calls: number of net calls that were timed.
    """

    chosen: str
    seconds: tuple[tuple[str, float], ...]
    calls: int

    def json(self) -> dict[str, Any]:
        return {"chosen": self.chosen, "seconds": dict(self.seconds), "calls": self.calls}

    @classmethod
    def from_json(cls, value: Any) -> Verdict:
        """The inverse of `json`.

        Raises:
            ValueError, TypeError, KeyError, AttributeError, OverflowError: it is no verdict.
        """
        seconds = {str(name): float(took) for name, took in dict(value["seconds"]).items()}
        sound = all(0 < took < math.inf for took in seconds.values())
        sound = sound and (not seconds or value["chosen"] in seconds)
        if not isinstance(value["chosen"], str) or not sound:
            raise ValueError(f"no verdict: {value}")
        return cls(value["chosen"], tuple(seconds.items()), int(value["calls"]))


class Verdicts:
    """Verdicts by the text of their keys. For several threads: each step is one of a dictionary."""

    def __init__(self) -> None:
        self._known: dict[str, Verdict | None] = {}  # None: asked, and the disk has none
        self._pinned: dict[str, Verdict] = {}
        self.version = 0  # grows after whatever may have changed an answer

    def get(self, subject: str, machine: str | None) -> Verdict | None:
        """The verdict on `subject` (see `subject_of`): pinned, or else made on `machine`."""
        pinned = self._pinned.get(subject)
        if pinned is not None or machine is None:
            return pinned
        known, key = self._known, f"{subject}\n{machine}"
        return known[key] if key in known else known.setdefault(key, _read(key))

    def keep(self, subject: str, machine: str, verdict: Verdict, lasting: bool = True) -> None:
        """Keep a verdict for the process and, if it is lasting and the folder lets us, on disk."""
        key = f"{subject}\n{machine}"
        self._known[key] = verdict
        self._pinned.pop(subject, None)  # it could not be followed here
        self.version += 1
        if lasting and (path := _path(key)) is not None:
            with contextlib.suppress(OSError):  # a full or read-only disk: the next one measures
                write_json(path, {"key": key, **verdict.json()})

    def pin(self, verdicts: Mapping[str, Any]) -> None:
        """Take these ({subject: `Verdict.json()`}) before all others, whatever machine made them;
        what is no verdict is left out."""
        for subject, value in verdicts.items():
            with contextlib.suppress(*_NO_VERDICT):
                self._pinned[subject] = Verdict.from_json(value)
        self.version += 1

    def forget(self) -> None:
        """Ask the disk anew, and drop what was pinned."""
        self._known, self._pinned = {}, {}
        self.version += 1


VERDICTS = Verdicts()


def subject_of(half: str, problem: Problem) -> str:
    """What a verdict is about, as text.

    B is rounded up to a power of two: a batch that shrinks while it is solved would be measured
    anew at every size, and the winner seldom changes within a factor of two.
    """
    batch = 1 << max(problem.batch - 1, 0).bit_length()
    return (
        f"{half} B={batch} T={problem.tokens} D={problem.hidden} {str(problem.dtype)[6:]} "
        f"{problem.device_type} rope={problem.rope} {encode(problem.schedule, problem.nets)}"
    )


@functools.lru_cache(maxsize=64)
def machine_of(device: torch.device, threads: int) -> str:
    """Everything beside the problem on which a time depends, as text.

    Args:
        threads: of a CPU; any number on a GPU.
    """
    parts = {
        "recurx": sys.modules[__package__].__version__,
        "torch": torch.__version__, "triton": _version("triton"),
        "module": _module_identity(),
    }  # fmt: skip
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        parts |= {
            "device": found.name, "capability": f"{found.major}.{found.minor}",
            "units": found.multi_processor_count,
            "driver": getattr(torch._C, "_cuda_getDriverVersion", int)(),
            "toolkit": torch.version.cuda or torch.version.hip,
        }  # fmt: skip
    else:
        parts |= {"device": processor()[0], "isa": engine_isa(), "threads": threads}
    return json.dumps(parts)


def folder() -> Path | None:
    """Where the files lie; None if there is no such place or RECURX_CACHE=0."""
    named = os.environ.get("RECURX_CACHE", "")
    if named == "0":
        return None
    try:
        if named:
            return Path(named).expanduser() / FORMAT
        shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
        base = shared if shared.is_absolute() else Path.home() / ".cache"
        return base / "recurx" / FORMAT
    except RuntimeError:  # this user has no home
        return None


def count() -> int:
    """How many verdicts lie on disk."""
    where = folder()
    return 0 if where is None else sum(1 for _ in where.glob("*.json"))


def _path(key: str) -> Path | None:
    where, name = folder(), hashlib.sha256(key.encode()).hexdigest()[:32]
    return None if where is None else where / f"{name}.json"


def _read(key: str) -> Verdict | None:
    path = _path(key)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(LARGEST_FILE))
        if value["key"] != key:
            return None
        verdict = Verdict.from_json(value)
    except (OSError, RecursionError, *_NO_VERDICT):
        return None
    return verdict if verdict.seconds else None  # on disk lies nothing that was not measured


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _module_identity() -> str:
    """Of the compiled module: a build of other sources has another time or size."""
    try:
        from recurx import _C

        found = os.stat(_C.__file__)
    except (ImportError, OSError, TypeError, AttributeError):
        return ""
    return f"{found.st_size}-{found.st_mtime_ns}"
