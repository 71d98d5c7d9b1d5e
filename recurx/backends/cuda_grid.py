"""What the grid kernel is given: its settings, and weights as its layout.cuh describes them.

The tape of a net is its weights one after another, block by block, each cut into units of output
channels, each unit into pieces that a warp reads as 16 bytes a lane: operands of mma.sync, ready to
use. With FP8 they are half as long, and the scales of a unit lie behind its codes. Packing is a
permutation, which PyTorch does wherever the weights are; it stands here and not in a kernel as with
the other families, because with FP8 it starts from the codes that `recurx.fp8` keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from recurx.backends.cuda_abi import RxGridPlan
from recurx.fp8 import registered
from recurx.nets import ATTENTION, BlockSpec, NetSpec
from recurx.packed import round_into
from recurx.plan.cuda_grid import SLOTS
from recurx.plan.launch import LaunchPlan


def settings(plan: LaunchPlan) -> RxGridPlan:
    """The C struct of a plan of kind "grid"."""
    made = RxGridPlan(**{name: plan[name] for name in ("ctas", "shared_bytes", "cluster")})
    made.row_groups[:] = [plan[f"groups_{slot}"] for slot in SLOTS]
    made.k_splits[:] = [plan[f"splits_{slot}"] for slot in SLOTS]
    made.fp8 = plan["weights"] == "fp8"
    return made


def pack(spec: NetSpec, weights: Sequence[Tensor], fp8: bool = False) -> Tensor:
    """The tape of a net: flat on the weights' device, bf16, or bytes with FP8.

    Args:
        spec: the net.
        weights: flat, in the order of `recurx.nets.WEIGHT_NAMES`, any floating dtype; with `fp8`
            such that `recurx.fp8.are_quantized` of them.
    """
    if not fp8:
        return in_order(spec, [weight.detach().bfloat16() for weight in weights])
    return torch.cat([_codes(*each) for each in _slots(spec, weights)])


def packer(spec: NetSpec, device: torch.device) -> Callable[[Sequence[Tensor]], Tensor]:
    """What `pack` does without FP8 in two launches, whatever the net, and into memory that stays:
    all weights are rounded, then gathered; element 0 is the zero of the padding."""
    shapes = [shape for block in spec.blocks for shape in block.weight_shapes]
    sizes = [math.prod(shape) for shape in shapes]

    def cut(flat: Tensor) -> list[Tensor]:
        return [part.view(s) for part, s in zip(flat[1:].split(sizes), shapes, strict=True)]

    numbers = torch.arange(1 + sum(sizes), dtype=torch.int32, device=device)
    flat, order = torch.zeros_like(numbers, dtype=torch.bfloat16), in_order(spec, cut(numbers))
    rounded, tape = cut(flat), flat.new_empty(len(order))

    def fill(weights: Sequence[Tensor]) -> Tensor:
        round_into(rounded, weights)
        return torch.index_select(flat, 0, order, out=tape)

    return fill


def in_order(spec: NetSpec, values: Sequence[Tensor]) -> Tensor:
    """Values of any dtype in the shapes of the weights, in the order of the tape, flat."""
    return torch.cat([_units(*each).reshape(-1) for each in _slots(spec, values)])


def _slots(spec: NetSpec, values: Sequence[Tensor]) -> list[tuple[BlockSpec, int, Tensor]]:
    blocks = spec.by_block(values)
    return [(block, slot, value) for block, own in blocks for slot, value in enumerate(own)]


def _codes(block: BlockSpec, slot: int, weight: Tensor) -> Tensor:
    """The codes of a weight and behind those of each unit their scales, as bytes."""
    codes = registered(weight)
    assert codes is not None, "the caller asks for FP8 of quantised weights only"
    values = _units(block, slot, codes.codes.view(torch.uint8))
    scales = _padded(_rows(block, slot, codes.scales[:, None]), 16 if slot % 2 == 0 else 8, 1)
    scales = scales.reshape(len(values), -1).contiguous().view(torch.uint8)
    return torch.cat([values.reshape(len(values), -1), scales], dim=1).reshape(-1)


def _rows(block: BlockSpec, slot: int, weight: Tensor) -> Tensor:
    """The output channels in the order of the units."""
    if slot == 0 and block.kind == ATTENTION:
        return _pair_rotated_columns(weight, block.num_heads)
    return _pair_gate_with_up(weight) if slot % 2 == 0 else weight


def _units(block: BlockSpec, slot: int, weight: Tensor) -> Tensor:
    """[units, values of a unit]: the products that go in are wide, those that come out narrow."""
    return (wide if slot % 2 == 0 else narrow)(_rows(block, slot, weight))


def _padded(weight: Tensor, rows: int, depth: int) -> Tensor:
    """`weight` [out, in] with zeros added until its sizes are multiples of `rows` and `depth`."""
    return F.pad(weight, (0, -weight.shape[1] % depth, 0, -weight.shape[0] % rows))


def wide(weight: Tensor) -> Tensor:
    """Units of 16 channels: lane 4g + t of a 16 x 16 piece holds the words (2 values each)
    (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) of (channel, depth)."""
    weight = _padded(weight, 16, 16)
    units, depth = weight.shape[0] // 16, weight.shape[1] // 16
    pieces = weight.reshape(units, 2, 8, depth, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    return pieces.reshape(units, -1)


def narrow(weight: Tensor) -> Tensor:
    """Units of 8 channels: lane 4g + t of an 8 x 32 piece holds the words
    (g, 2t), (g, 2t + 8), (g, 2t + 16), (g, 2t + 24) of (channel, depth)."""
    weight = _padded(weight, 8, 32)
    units, depth = weight.shape[0] // 8, weight.shape[1] // 32
    pieces = weight.reshape(units, 8, depth, 2, 2, 4, 2).permute(0, 2, 1, 5, 3, 4, 6)
    return pieces.reshape(units, -1)


def _pair_rotated_columns(qkv: Tensor, heads: int) -> Tensor:
    """Q and K in units of the channels (j .. j+7, j + head_dim/2 .. +7), which RoPE combines."""
    query_key, value = qkv.tensor_split([2 * qkv.shape[0] // 3])
    dim = value.shape[0] // heads
    paired = query_key.reshape(2 * heads, 2, dim // 16, 8, -1).transpose(1, 2)
    return torch.cat([paired.reshape(query_key.shape), value])


def _pair_gate_with_up(gate_up: Tensor) -> Tensor:
    """Units of eight gates and their eight ups; the inner width is padded to a multiple of 32."""
    gate, up = (_padded(half, 32, 1) for half in gate_up.chunk(2))
    return torch.stack([gate.unflatten(0, (-1, 8)), up.unflatten(0, (-1, 8))], 1).flatten(0, 2)
