"""Models, and what their operators must be: counted by hand from the text of the lookalikes."""

from __future__ import annotations

import functools
from typing import Any

import recurx
from tests import lookalike

Model = Any

# variant -> (fields, net calls of a step, calls of a cycle, blocks of all calls)
CASES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "trm": ({}, 6, 3, 12),
    "trm-mlp": ({"mlp_t": True}, 6, 3, 12),
    "trm-bf16": ({"forward_dtype": "bfloat16"}, 6, 3, 12),
    "single_z": ({}, 6, 3, 12),
    "hier6": ({"L_cycles": 6}, 14, 7, 28),
    "hrm": ({}, 6, 3, 10),
}
# Additions that form the inputs of all calls of one cycle: in the inner module and in the net.
INJECT_ADDS = {"trm": 5, "trm-mlp": 5, "trm-bf16": 5, "single_z": 2, "hrm": 5, "hier6": 6 * 7 + 6}
ATTENTION_STAGES = {"qkv", "rope", "attention", "o"}
TOKEN_STAGES = {"t_gate_up", "t_swiglu", "t_down", "t_norm"}
BLOCK_STAGES = {"gate_up", "swiglu", "down", "norm", "inject"}


def build(case: str, quirks: frozenset[str] = frozenset()) -> Model:
    fields = CASES[case][0]
    return lookalike.build(case.partition("-")[0], quirks=quirks, **fields)


def profile(model: Model, **arguments: Any) -> recurx.profile.Profile:  # type: ignore[name-defined]
    """A short profile of a lookalike."""
    carry, batch = lookalike.inputs(model)
    arguments = {"compare": False, "seconds": 0.05, "halting_steps": 0} | arguments
    return recurx.profile(model, batch, carry=carry, **arguments)


@functools.cache
def profiled(case: str) -> recurx.profile.Profile:  # type: ignore[name-defined]
    """One supervision step of a lookalike, profiled once for all tests."""
    return profile(build(case))


def kernels_of(found: Any, stage: str, forward_only: bool = True) -> dict[str, int]:
    """{operator: count} of a stage, views left out."""
    counted: dict[str, int] = {}
    for op in found.ops:
        if op.stage == stage and not op.free and (op.phase == "forward" or not forward_only):
            counted[op.name] = counted.get(op.name, 0) + 1
    return counted


def expected_kernels(case: str) -> dict[str, dict[str, int]]:
    """{stage: {operator: count}} of one supervision step of a lookalike, by its source."""
    _, calls, cycle, blocks = CASES[case]
    bf16, heads = case.endswith("bf16"), 2  # q and k
    product = {"mm": blocks} | ({"_to_copy": blocks} if bf16 else {})
    norm = {"add": 2, "pow": 1, "mean": 1, "rsqrt": 1, "mul": 1} | ({"_to_copy": 2} if bf16 else {})
    one_norm = {name: blocks * count for name, count in norm.items()}
    two_norms = {name: 2 * count for name, count in one_norm.items()}
    # The lookalike scales the residual of its MLP (by 1): one more product in that norm.
    mlp_norm = one_norm | {"mul": 2 * blocks}
    two_norms["mul"] += blocks
    cycles = calls // cycle
    expected = {
        "inject": {"add": cycles * INJECT_ADDS[case]},
        "gate_up": product,
        "swiglu": {"silu": blocks, "mul": blocks},
        "down": product,
    }
    if case == "trm-mlp":
        return expected | {
            "t_swiglu": expected["swiglu"], "norm": mlp_norm, "t_norm": one_norm,
        }  # fmt: skip
    rope = {"mul": 2, "neg": 1, "cat": 1, "add": 1} | ({"_to_copy": 2} if bf16 else {})
    return expected | {
        "qkv": product,
        "o": product,
        "rope": {name: heads * blocks * count for name, count in rope.items()},
        "attention": {"_scaled_dot_product_flash_attention_for_cpu": blocks},
        "norm": two_norms,
    }
