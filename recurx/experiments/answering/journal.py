"""`--out FILE`: a file that grows by parts, survives a kill at any moment, and is gone on with.

The work is cut at fixed places of the input into parts of `size` puzzles. Part n is the work of
rank n modulo the number of ranks, always as one batch, so results do not depend on how many ranks
there are, nor on where a killed run stopped. The first rank alone writes: whole parts, in order,
each flushed to the disk. What a kill cut off in the middle of a part is dropped and done again.

    FILE        one line for each puzzle, or for each part
    FILE.job    how FILE is made; whoever goes on must want the same
    FILE.lock   while a run writes
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from recurx.atomic import explained, locked, write_json
from recurx.errors import InvalidArgument
from recurx.train.ranks import Ranks

M_MMAP_THRESHOLD = -3  # of mallopt
SAY_EVERY = 5.0  # seconds
Part = TypeVar("Part")


@dataclass
class Done:
    """What a run has done: puzzles of earlier runs, those of this one, and what was counted."""

    before: int = 0
    now: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)


def sha256(path: str | Path) -> str:
    """Of a file, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class Journal:
    """The file, held by one process.

    Args:
        per_part: lines of a whole part.
        heading: the first line, of a CSV; "" for none.
        job: what FILE.job says, fit for JSON.

    Raises:
        InvalidArgument: FILE is somebody else's, or was made in another way.
    """

    def __init__(self, path: Path, per_part: int, heading: str, job: Mapping[str, Any]) -> None:
        self.path, self.per_part, self.heading = path, per_part, heading
        note = path.with_name(path.name + ".job")
        wanted = json.loads(json.dumps(dict(job)))
        if not note.exists():
            if path.exists() and path.stat().st_size:
                raise InvalidArgument(
                    f"--out: {path} exists, and no {note.name} says how it was made. Choose "
                    "another name."
                )
            write_json(note, wanted)
        before = json.loads(note.read_text(encoding="utf-8"))
        differs = [key for key in {*before, *wanted} if before.get(key) != wanted.get(key)]
        if differs:
            told = "; ".join(
                f"{key}: {before.get(key)!r} then, {wanted.get(key)!r} now"
                for key in sorted(differs)
            )
            raise InvalidArgument(
                f"--out: {path} was begun in another way ({told}). Say the same, or choose another "
                "name."
            )
        with explained(path):
            self._file: IO[bytes] = path.open("a+b")
        # Offset of each part's end, and of lines after the last whole part.
        self.parts, self.over, self._end = self._read()

    def _read(self) -> tuple[int, int, int]:
        """(whole parts, lines beyond them, where the last whole part ends)."""
        self._file.seek(0)
        lines = -bool(self.heading)
        at = end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break  # a kill cut it off
            at += len(line)
            lines += 1
            if lines % self.per_part == 0:
                end = at
        lines = max(lines, 0)
        return lines // self.per_part, lines % self.per_part, end

    def append(self, lines: Sequence[str]) -> None:
        """Write a part, in place of lines that are no whole part."""
        with explained(self.path):
            self._file.truncate(self._end)
            first = [self.heading] if self.heading and not self._end else []
            self._file.write("".join(f"{line}\n" for line in [*first, *lines]).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._end = self._file.seek(0, os.SEEK_END)

    def lines(self) -> Iterator[str]:
        """What is written, without the heading."""
        self._file.seek(0)
        for number, line in enumerate(self._file):
            if number or not self.heading:
                yield line.decode().rstrip("\n")

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def opened(
    path: str, ranks: Ranks, per_part: int, heading: str, job: Mapping[str, Any]
) -> Iterator[tuple[Journal | None, tuple[int, int]]]:
    """The journal on the first rank, None on the others, which wait until it is open; and what it
    has: whole parts, and lines beyond them."""
    if not ranks.first:
        yield None, ranks.first_says(None)
        return
    with (
        locked(Path(path + ".lock")),
        contextlib.closing(Journal(Path(path), per_part, heading, job)) as journal,
    ):
        yield journal, ranks.first_says((journal.parts, journal.over))


def run(
    parts: Iterator[Part], size_of: Callable[[Part], int], work: Callable[[int, Part], Any],
    journal: Journal | None, ranks: Ranks, resumed: tuple[int, int],
    say: Callable[[Done], object],
) -> Done:  # fmt: skip
    """Do all parts that are not done.

    Args:
        parts: all parts of the input, the same on every rank.
        work: (number, part) to (lines, counts).
        resumed: whole parts that the journal has, and lines beyond them.
        say: called on the first rank every few seconds, and at the end.
    """
    _give_back_memory()
    done = Done()
    start = said = time.monotonic()
    done.before = sum(size_of(part) for part in itertools.islice(parts, resumed[0]))
    numbered, first = enumerate(parts, start=resumed[0]), True
    while round_ := list(itertools.islice(numbered, ranks.world)):
        # The lines beyond the last whole part are the last part, if it has just as many.
        if first and len(round_) == 1 and resumed[1] and resumed[1] == size_of(round_[0][1]):
            done.before += resumed[1]
            break
        first = False
        own = [(n, *work(n, part)) for n, part in round_ if n % ranks.world == ranks.rank]
        for _, lines, counts in sorted(_gathered(own, ranks), key=lambda one: one[0]):
            assert journal is not None
            journal.append(lines)
            done.counts.update(counts)
        done.now += sum(size_of(part) for _, part in round_)
        done.seconds = time.monotonic() - start
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            say(done)
    say(done)
    return done


def _give_back_memory() -> None:
    """Of tensors over 128 KB, when they are freed, in this process: glibc would keep it for others
    and finds no place in it for those that come."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17)


def _gathered(own: list[Any], ranks: Ranks) -> list[Any]:
    """What every rank has, on the first; nothing on the others."""
    if ranks.world == 1:
        return own
    import torch.distributed as dist

    every: list[Any] | None = [None] * ranks.world if ranks.first else None
    dist.gather_object(own, every)
    return [one for some in every or () for one in some]
