"""Opening a file of puzzles, with errors that say what it is not."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from recurx.errors import InvalidArgument


@contextlib.contextmanager
def opened(path: str | Path, what: str) -> Iterator[TextIO]:
    """A text or CSV file of `what` ("puzzles"), read within the block.

    Raises:
        InvalidArgument: it cannot be read, or is no text, or no CSV to one who reads it as such.
    """
    try:
        # utf-8-sig: some editors begin a file with a byte order mark.
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            yield file
    except OSError as error:
        raise InvalidArgument(f"{what}: cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{what}: {path} is not a text file ({error.reason}).") from error
    except csv.Error as error:
        raise InvalidArgument(f"{what}: {path} is not a CSV file ({error}).") from error
