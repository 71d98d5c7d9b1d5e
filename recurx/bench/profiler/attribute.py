"""From where each operator ran to the stage it belongs to.

Modules tell most of it. Three things show only in the order of the operators: what lies between
QKV and O is rotary embedding up to the last operator before attention's own, and attention after
it; what a block does itself is the norm of the mixer or of the MLP; and what the inner module does
itself is embedding before the first net call (but for the sums right before it, which are the
call's), input sums between calls, heads after the last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from recurx.bench.profiler.records import BACKWARD, Op, Trace

# Stage -> (group, label), in the order of the report. Stages of a block are those of
# `recurx.plan.count`; a name not listed is a range of the user, or a module of foreign code.
STAGES = {
    "act": ("around", "carry, halting (ACT)"),
    "embedding": ("around", "input embedding"),
    "inject": ("net", "inject: sums before a call"),
    "qkv": ("net", "QKV product"),
    "rope": ("net", "RoPE"),
    "attention": ("net", "attention"),
    "o": ("net", "O product"),
    "t_gate_up": ("net", "token MLP: gate-up product"),
    "t_swiglu": ("net", "token MLP: SwiGLU"),
    "t_down": ("net", "token MLP: down product"),
    "t_norm": ("net", "token MLP: residual + norm"),
    "gate_up": ("net", "gate-up product"),
    "swiglu": ("net", "SwiGLU"),
    "down": ("net", "down product"),
    "norm": ("net", "residual + norm"),
    "foreign": ("net", "net of foreign code"),
    "recursion": ("net", "fused recursion (recurx)"),
    "lm_head": ("around", "lm_head"),
    "q_head": ("around", "q_head"),
    "heads": ("around", "cut, detach, cast of the outputs"),
    "loss": ("training", "loss, metrics"),
    "gradients": ("training", "gradient accumulation"),
    "optimizer": ("training", "optimiser"),
    "ema": ("training", "EMA"),
    "other": ("other", "other"),
}
NET_STAGES = tuple(name for name, (group, _) in STAGES.items() if group == "net")
PRODUCTS = ("qkv", "o", "gate_up", "down", "t_gate_up", "t_down", "lm_head", "q_head")

# Kinds of stages, which the report colours.
KINDS = {
    "product": "products",
    "attention": "attention",
    "glue": "norms, RoPE, SwiGLU, sums",
    "fused": "fused recursion",
    "around": "around the recursion",
    "training": "training",
    "other": "everything else",
}
_OWN_KIND = {"attention": "attention", "recursion": "fused", "foreign": "other"}


def kind_of(stage: str) -> str:
    """The kind of a stage, a key of `KINDS`."""
    base = stage.partition(": ")[0]
    group = STAGES.get(base, ("other", ""))[0]
    of_a_net = "product" if base in PRODUCTS else _OWN_KIND.get(base, "glue")
    return of_a_net if group == "net" else group


_ATTENTION_CORE = ("scaled_dot_product", "flash_attn", "_softmax", "bmm", "efficient_attention")
_INNER = ("inner", "io", "lm_head", "q_head")
_MLP = ("gate_up", "swiglu", "down")


def resolve(trace: Trace) -> None:
    """Fill `stage`, `call`, `cycle` and `net` of every operator."""
    forward = [op for op in trace.ops if op.phase != BACKWARD]
    for op in forward:
        op.call, op.net = op.where.call, op.where.name
        op.stage = _plain(op)
    _resolve_inner(forward)
    for group in _groups(forward, ("self_attn", "attention", "rope")):
        _resolve_attention(group)
    for group in _groups(forward, ("block", *_MLP, "t_gate_up", "t_swiglu", "t_down")):
        _resolve_block(group)
    for op in trace.ops:
        if op.phase == BACKWARD:
            _resolve_backward(op, trace.ops)
        length = trace.cycles.get(op.where.recursion, 0)
        if op.call >= 0 and length:
            op.cycle = op.call // length


def _plain(op: Op) -> str:
    """The stage as far as the operator alone tells; "" for those that need their neighbours."""
    part, name = op.where.part, op.where.name
    if op.split is not None:
        return "recursion"
    if part in STAGES:
        return part
    if part == "net":
        return "inject"
    if part == "user":
        return name
    if part == "module":
        return f"module {name}"
    return "other" if part == "top" else ""


def _groups(ops: Iterable[Op], parts: tuple[str, ...]) -> list[list[Op]]:
    """Operators of these parts, block by block of every call."""
    found: dict[tuple[int, int, int], list[Op]] = defaultdict(list)
    for op in ops:
        if op.where.part in parts:
            found[op.where[2:]].append(op)
    return list(found.values())


def _resolve_inner(ops: list[Op]) -> None:
    """Embedding before the first net call of a recursion, inject between, heads after."""
    calls = [_is_call(op) for op in ops]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, op in enumerate(ops):
        if calls[index]:
            first.setdefault(op.where.recursion, index)
            last[op.where.recursion] = index
    following: Op | None = None
    sums = False  # whether only sums lie between this operator and the first net call
    for index in range(len(ops) - 1, -1, -1):
        op = ops[index]
        if calls[index]:
            following, sums = op, True
            continue
        sums = sums and op.name == "add"
        if op.where.part not in _INNER or op.split is not None:
            continue
        recursion = op.where.recursion
        if index > last.get(recursion, -1):
            op.stage = op.where.part if op.where.part in ("lm_head", "q_head") else "heads"
        elif index < first[recursion] and not sums:
            op.stage = "embedding"
        elif following is not None:
            op.stage, op.call, op.net = "inject", following.where.call, following.where.name
        if op.stage != "inject":
            op.call, op.net = -1, ""


def _is_call(op: Op) -> bool:
    return op.split is not None or (op.where.call >= 0 and op.where.part not in _INNER)


def _resolve_attention(group: list[Op]) -> None:
    """Rotary embedding or attention, for the operators between QKV and O of one block."""
    open_ops = [op for op in group if op.where.part == "self_attn"]
    named = any(op.where.part == "rope" for op in group)
    core = next((i for i, op in enumerate(group) if _is_core(op)), len(group))
    before = group[:core]
    # Without tables or a rotation, nothing of it is RoPE (learned positions).
    rotates = any(op.reads_table or op.name == "neg" for op in before)
    last = max((i for i, op in enumerate(before) if not op.free and op.name != "clone"), default=-1)
    for op in open_ops:
        is_rope = not named and rotates and any(op is other for other in before[: last + 1])
        op.stage = "rope" if is_rope else "attention"


def _is_core(op: Op) -> bool:
    return op.where.part == "attention" or any(name in op.name for name in _ATTENTION_CORE)


def _resolve_block(group: list[Op]) -> None:
    """Residual and norm of the mixer (t_norm after a token MLP) or of the MLP."""
    tokens = any(op.where.part.startswith("t_") for op in group)
    in_mixer = tokens
    for op in group:
        if op.where.part in _MLP:
            in_mixer = False
        elif op.where.part == "block":
            op.stage = "t_norm" if in_mixer else "norm"


def _resolve_backward(op: Op, ops: list[Op]) -> None:
    """The stage of the forward operator whose gradient it is."""
    if op.origin < 0:
        op.stage = "recursion" if op.split is not None else "gradients"
        return
    origin = ops[op.origin]
    op.stage, op.call, op.net, op.where = origin.stage, origin.call, origin.net, origin.where
