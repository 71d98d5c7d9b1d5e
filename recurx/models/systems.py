"""What tells the published systems apart that one configurable model is: data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from recurx.schedule import Schedule


@dataclass(frozen=True)
class Variant:
    """What distinguishes one published system from another.

    Args:
        init: {state: name of its init buffer in the state_dict}, in the order of creation.
        nets: {net of the schedule: name of its module}, in the order of creation.
        schedule: (H_cycles, L_cycles, grad_window) -> Schedule.
        output: the state that the heads read.
    """

    init: Mapping[str, str]
    nets: Mapping[str, str]
    schedule: Callable[[int, int, int | str | None], Schedule]
    output: str = "z_H"


_TWO_STATES = {"z_H": "H_init", "z_L": "L_init"}
_SIX_LOW = {"z_H": "H_init", **{f"z_L{k}": f"L{k}_init" for k in range(1, 7)}}

VARIANTS = {
    "trm": Variant(_TWO_STATES, {"L": "L_level"}, Schedule.trm),
    "single_z": Variant({"z": "L_init"}, {"L": "L_level"}, Schedule.single_z, output="z"),
    "hier6": Variant(
        _SIX_LOW, {"L": "L_level"}, lambda h, low, window: Schedule.hier(6, h, low, window)
    ),
    "hrm": Variant(_TWO_STATES, {"H": "H_level", "L": "L_level"}, Schedule.hrm),
}
