"""Which of two results is faster, by how much, and whether that is more than noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recurx.bench.results import Key, Result
from recurx.errors import InvalidArgument

RESAMPLES = 2000
CONFIDENCE = 0.99  # of each row; a file has dozens of them
SMALLEST = 0.03  # differences below this share are called none: layout and clocks change so much
FEW = 6  # rounds below which the spread p20..p80 decides instead of resampling


@dataclass(frozen=True)
class Difference:
    """One row of two results.

    Args:
        ratio: time of B over time of A, at p50.
        low, high: bounds of the ratio.
        how: "rounds resampled" or "p20 to p80".
        verdict: "slower", "faster" or "same": B against A.
    """

    key: Key
    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float
    how: str
    verdict: str


def difference(key: Key, before: dict, after: dict) -> Difference:
    """Compare one timed row of two results."""
    ratio = after["p50_ms"] / before["p50_ms"]
    a, b = before["times_ms"], after["times_ms"]
    if min(len(a), len(b)) >= FEW:
        low, high = _resampled(np.array(a), np.array(b))
        how = "rounds resampled"
    else:
        low, high = after["p20_ms"] / before["p80_ms"], after["p80_ms"] / before["p20_ms"]
        how = "p20 to p80"
    verdict = "same"
    if low > 1 and ratio > 1 + SMALLEST:
        verdict = "slower"
    elif high < 1 and ratio < 1 - SMALLEST:
        verdict = "faster"
    return Difference(key, before["p50_ms"], after["p50_ms"], ratio, low, high, how, verdict)


def _resampled(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Bounds of the ratio of medians by the bootstrap, with a fixed seed."""
    rng = np.random.default_rng(0)
    drawn = [np.median(rng.choice(times, (RESAMPLES, len(times))), axis=1) for times in (a, b)]
    ratios = drawn[1] / drawn[0]
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(ratios, tail)), float(np.quantile(ratios, 1 - tail))


def compare(before: Result, after: Result, force: bool = False) -> list[Difference]:
    """Every row that both have timed, in the order of `after`.

    Raises:
        InvalidArgument: two devices (unless `force`), or nothing in common.
    """
    if before.device != after.device and not force:
        raise InvalidArgument(
            f"bench compare: {before.path} is of {before.device}, {after.path} of {after.device}: "
            "their difference says nothing about the code. --force compares all the same."
        )
    old = before.timed()
    found = [difference(key, old[key], row) for key, row in after.timed().items() if key in old]
    if not found:
        raise InvalidArgument(
            f"bench compare: {before.path} and {after.path} have no timed row in common."
        )
    return found


def lost(before: Result, after: Result) -> list[tuple[Key, str]]:
    """Rows that were timed before and have no time now, with the reason."""
    now = {key: row for key, row in after.rows() if row["status"] != "timed"}
    return [(key, now[key]["reason"]) for key in before.timed() if key in now]


def newest_before(results: list[Result], after: Result) -> Result | None:
    """The newest earlier row of each key of `after`, from all results of its device, as one result;
    None if there is none. `results` come oldest first."""
    wanted, found, files = set(after.timed()), {}, {}
    for result in results:
        if result.device == after.device and result.date < after.date:
            for key, row in result.timed().items():
                if key in wanted:
                    found[key], files[key] = row, result
    if not found:
        return None
    groups = [
        {"case": key.case, "mode": key.mode, "batch": key.batch, "rows": [row]}
        for key, row in found.items()
    ]
    sources = list({id(result): result for result in files.values()}.values())
    names = ", ".join(str(result.path) for result in sources)
    return Result(Path(names), {"provenance": sources[-1].facts, "groups": groups})


def newest_two(results: list[Result], known: list[Result]) -> tuple[Result, Result]:
    """The newest of `results` that anything in `known` precedes, and what precedes it.

    Raises:
        InvalidArgument: no earlier result is of the same device and shares a row.
    """
    for after in reversed(results):
        before = newest_before(known, after)
        if before is not None:
            return before, after
    names = ", ".join(str(result.path) for result in results) or "no file"
    raise InvalidArgument(
        f"bench compare: nothing of the same device and case is older than {names}. "
        "Name two files, or measure again: python -m recurx bench run."
    )


def machine_moved(found: list[Difference]) -> float:
    """Median ratio of PyTorch's eager rows: how much faster or slower the machine itself was."""
    eager = [d.ratio for d in found if d.key.variant.startswith("eager/")]
    return float(np.median(eager)) if eager else 1.0


def beyond_the_machine(found: list[Difference]) -> tuple[list[Difference], list[Difference]]:
    """recurx's rows that are slower, and that are faster, than the machine's own change explains:
    the whole range of noise lies beyond the median change of eager PyTorch."""
    moved = machine_moved(found)
    ours = [d for d in found if "recurx-" in d.key.variant]
    slower = [d for d in ours if d.verdict == "slower" and d.low > moved]
    faster = [d for d in ours if d.verdict == "faster" and d.high < moved]
    return slower, faster
