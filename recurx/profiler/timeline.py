"""Phases inside a kernel, as the CUDA engine records them: who did what, when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from recurx.errors import bad_argument

KEYS = ("owner", "call", "block", "phase", "start_ns", "end_ns")
OPTIONAL = ("sample",)


@dataclass(frozen=True)
class Timeline:
    """Events of one kernel, sorted by owner and time; the clock starts at the first event."""

    events: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, events: Iterable[dict[str, Any]]) -> Timeline:
        """Checked and sorted.

        Raises:
            InvalidArgument: an event lacks a key, or ends before it starts.
        """
        checked = []
        for number, event in enumerate(events):
            missing = [key for key in KEYS if key not in event]
            if missing:
                raise bad_argument(
                    "profile", f"timeline[{number}]", f"a dict with {', '.join(KEYS)}",
                    f"one without {', '.join(missing)}",
                )  # fmt: skip
            if event["end_ns"] < event["start_ns"]:
                raise bad_argument(
                    "profile", f"timeline[{number}]", "end_ns >= start_ns",
                    f"{event['start_ns']}..{event['end_ns']}",
                )  # fmt: skip
            checked.append({key: event[key] for key in (*KEYS, *OPTIONAL) if key in event})
        first = min((event["start_ns"] for event in checked), default=0)
        for event in checked:
            event |= {key: event[key] - first for key in ("start_ns", "end_ns")}
        checked.sort(key=lambda e: (e["owner"], e["start_ns"], -e["end_ns"]))
        return cls(tuple(checked))

    @property
    def owners(self) -> list[int]:
        return sorted({event["owner"] for event in self.events})

    @property
    def span_ms(self) -> float:
        """From the first event to the end of the last."""
        return max((event["end_ns"] for event in self.events), default=0) * 1e-6

    def phases(self) -> dict[str, float]:
        """{phase: ms}, mean over owners, longest first; "(between phases)" is what is left."""
        total: dict[str, float] = defaultdict(float)
        for event in self.events:
            total[event["phase"]] += (event["end_ns"] - event["start_ns"]) * 1e-6
        owners = len(self.owners) or 1
        mean = {phase: ms / owners for phase, ms in total.items()}
        mean["(between phases)"] = max(0.0, self.span_ms - sum(mean.values()))
        return dict(sorted(mean.items(), key=lambda item: -item[1]))

    def shares(self) -> dict[str, float]:
        """{phase: share of the kernel}."""
        phases = self.phases()
        total = sum(phases.values()) or 1.0
        return {phase: ms / total for phase, ms in phases.items()}

    def to_dict(self) -> dict[str, Any]:
        return {"owners": len(self.owners), "span_ms": self.span_ms, "phases_ms": self.phases()}
