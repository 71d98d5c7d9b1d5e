"""Tile sizes of the Triton kernels: the only place where they are chosen.

A tile is picked from the shape, the storage type and the shared memory one block may use, never
from a device's name, so that the same choice can be compiled and inspected without that device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Shared memory a block may use (bytes), by compute capability: CUDA C programming guide, table of
# technical specifications per compute capability, "maximum amount of shared memory per block".
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

# The part of it the compiler takes for its own scratch beside the pipeline's buffers.
SCRATCH_BYTES = 4096

# Devices with so much are the ones whose products read shared memory (sm_90, sm_100).
WGMMA_SHARED = 200_000

# rows x columns of a product's tile, from the most reuse of what is loaded to the most programs. An
# accumulator of 128 x 256 is 128 registers a thread of 8 warps. fp32 operands go through ordinary
# multiply-adds, from registers, and want a smaller tile.
PRODUCT_TILES = {2: ((128, 256), (128, 128), (64, 128), (64, 64), (32, 64)), 4: ((32, 64),)}
# Multiply-adds of a tensor core in the time that one operand takes from L2: a multiprocessor of an
# H100 does 2048 a clock and gets about 40 bytes. Reckoned, and near enough for the others.
LOAD_COST = 100


class Chip(NamedTuple):
    """What of a device decides a tile: shared memory (bytes) a block may use, multiprocessors."""

    shared: int
    units: int


@dataclass(frozen=True)
class Tile:
    """One launch configuration: the tile is `rows` x `cols * chunks`, stepped by `depth`."""

    rows: int
    cols: int
    chunks: int
    depth: int
    warps: int
    stages: int

    def stage_bytes(self, itemsize: int) -> int:
        """Shared memory of one pipeline stage: a slab of A and one of W."""
        return (self.rows + self.cols * self.chunks) * self.depth * itemsize


def shared_bytes(device: torch.device) -> int:
    """Shared memory per block of `device`; on the CPU (the interpreter) that of an sm_80."""
    if device.type != "cuda":
        return SHARED_BYTES[80]
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of `device`; on the CPU (the interpreter) those of an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def chip(device: torch.device) -> Chip:
    return Chip(shared_bytes(device), multiprocessors(device))


def _power(n: int) -> int:
    """The smallest power of two that is at least n, and 16: tl.dot takes no less."""
    return max(16, 1 << (n - 1).bit_length())


def _deep(rows: int, cols: int, k: int, itemsize: int, shared: int, warps: int) -> Tile:
    """Two tiles of `cols` columns each, with the depth and the stages that k and `shared` allow."""
    # With 64 columns of K large tiles spill where products read registers (mma.sync).
    large = rows * cols >= 128 * 64 and shared < WGMMA_SHARED
    depth = min(32 if itemsize == 4 or large else 64, _power(k))
    while depth > 16 and 3 * (rows + 2 * cols) * depth * itemsize > shared - SCRATCH_BYTES:
        depth //= 2
    tile = Tile(rows, cols, 2, depth, warps, stages=1)
    stages = min(4, (shared - SCRATCH_BYTES) // tile.stage_bytes(itemsize))
    return Tile(rows, cols, 2, depth, warps, max(1, stages))


@functools.lru_cache(maxsize=256)
def product_tile(m: int, n: int, k: int, itemsize: int, chip: Chip) -> Tile:
    """The tile of a product [m, n] over k whose columns are cut (kernels/linear.py).

    The one with the shortest time: as many rounds as the multiprocessors need for all programs,
    each as long as its products, or as its operands take from L2. Rows and columns do not depend on
    k, so products of one shape leave equally many sums of squares. With mma.sync, which holds
    operands in registers, the largest tile is on the edge of spilling; there products take twice as
    long beside their loads, so that the next one is large enough.
    """
    sizes = PRODUCT_TILES[itemsize]
    if chip.shared < WGMMA_SHARED and len(sizes) > 1:
        sizes = sizes[1:]

    def time(size: tuple[int, int]) -> int:
        rows, cols = size
        rounds = -(-(-(-m // rows) * -(-n // cols)) // chip.units)
        return rounds * max(rows * cols, LOAD_COST * (rows + cols))

    rows, cols = min(sizes, key=time)
    cols = max(16, min(cols // 2, _power(n) // 2))
    return _deep(rows, cols, k, itemsize, chip.shared, 8 if rows * cols >= 128 * 64 else 4)


def row_tile(n: int, k: int, itemsize: int, chip: Chip) -> Tile:
    """The tile of a product whose program owns whole rows of n columns (the norm of a token-MLP).

    The fp32 accumulator is 128 registers a thread at most; wgmma needs 64 rows.
    """
    width = max(32, _power(n))
    rows = (64 if width <= 512 else 32) // (2 if itemsize == 4 else 1)
    return _deep(rows, width // 2, k, itemsize, chip.shared, 8 if rows * width >= 64 * 128 else 4)


def pass_tile(n: int) -> tuple[int, int]:
    """(rows, columns) of a program of 4 warps that only reads and writes rows of n columns."""
    cols = _power(n)
    return max(1, 2048 // cols), cols


def attention_tile(
    tokens: int, head_dim: int, itemsize: int, shared: int, rotate: bool = False
) -> Tile:
    """rows are queries, cols keys a step; depth is the head dimension.

    Up to 128 tokens in bf16 a program has a whole head, and one step. Above that a step of 128 keys
    issues fewer instructions a key than one of 64 (sm_90: 3.6 and 4.7), but with mma.sync, or with
    the widest heads while they are rotated, it would spill.
    """
    longest = max(16, 1 << (tokens - 1).bit_length())
    deep = 128 if shared >= WGMMA_SHARED and head_dim < 128 else 64
    rows, cols = (longest, longest) if longest <= 128 else (128, deep)
    if itemsize == 4:
        rows, cols = min(rows, 32), min(cols, 32)
    # K and V of one step, and its rows of cos and sin
    step = 2 * cols * head_dim * (itemsize + 4 * rotate)
    held = rows * head_dim * itemsize
    stages = max(1, min(3, (shared - SCRATCH_BYTES - held) // step))
    wide = rows == 128 or (itemsize == 4 and head_dim == 128)
    return Tile(rows, cols, 1, head_dim, 8 if wide else 4, stages)


def options(tile: Tile) -> dict[str, object]:
    """Compiler options; a*b+c fusion is named because its default differs between versions."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
