"""Tile sizes of the Triton kernels: the only place where they are chosen.

A tile is picked from the shape, the storage type and the shared memory one block may use, never
from a device's name, so that the same choice can be compiled and inspected without that device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Shared memory a block may use (bytes), by compute capability: CUDA C programming guide, table of
# technical specifications per compute capability, "maximum amount of shared memory per block".
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

# The part of it the compiler takes for its own scratch beside the pipeline's buffers.
SCRATCH_BYTES = 4096

# Devices with so much are the ones whose products read shared memory (sm_90, sm_100).
WGMMA_SHARED = 200_000
# A tile of 128 rows pays from so many programs on: the multiprocessors of the smallest data-centre
# device here (A100, 108); below it more, smaller programs keep more of them busy.
LARGE_PROGRAMS = 108


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


def split_columns(n: int) -> tuple[int, int]:
    """(power of two, count) covering n columns with the least padding, at most 3 pieces.

    64 -> (64, 1), 384 -> (128, 3), 512 -> (512, 1), 768 -> (256, 3), 97 -> (128, 1).
    """
    whole = max(16, 1 << (n - 1).bit_length())
    third = max(16, 1 << (-(-n // 3) - 1).bit_length())
    return (third, 3) if 3 * third < whole else (whole, 1)


def row_tile(n: int, k: int, itemsize: int, shared: int) -> Tile:
    """The tile of a kernel whose program owns whole rows of n columns (a row sum stays local)."""
    cols, chunks = split_columns(n)
    width = cols * chunks
    # The fp32 accumulator is rows * width / 256 registers a thread: 128 of the 255. wgmma needs 64
    # rows; for wider rows 16 warps would hold them, but then a thread has 128 registers in all and
    # spills. fp32 operands go through ordinary multiply-adds and want half the rows.
    rows = 64 if width <= 512 else 32
    if itemsize == 4:
        rows //= 2
    warps = 8 if rows * width >= 64 * 128 else 4
    for depth in (64, 32, 16) if itemsize == 2 else (32, 16):
        tile = Tile(rows, cols, chunks, depth, warps, stages=1)
        stages = min(4, (shared - SCRATCH_BYTES) // tile.stage_bytes(itemsize))
        if depth <= max(16, k) and stages >= 3:
            break
    return Tile(rows, cols, chunks, depth, warps, max(1, stages))


def gate_up_tile(m: int, f: int, k: int, itemsize: int, shared: int, plain: bool = True) -> Tile:
    """The tile of kernels/gate_up_swiglu.py; `plain`: x has contiguous rows.

    Bytes from L2 bound these products (128 x 64 twice: 64 FLOP a byte, 128 x 128 twice: 85), so
    the tile is as large as registers allow. Where wgmma reads its operands from shared memory that
    is always; with mma.sync, which holds them in registers, only without masks over K.
    """
    wide = 128 if shared >= WGMMA_SHARED or (plain and k % 32 == 0) else 64
    return _output_tile(m, f, k, itemsize, shared, cols=64, wide=wide)


def qkv_tile(m: int, d: int, itemsize: int, shared: int) -> Tile:
    """The tile of kernels/qkv_rope.py.

    Its epilogue holds the rotary tables as well: with mma.sync 64 columns of each half spill.
    """
    wide = 64 if shared >= WGMMA_SHARED else 32
    return _output_tile(m, 3 * d // 2, d, itemsize, shared, cols=32, wide=wide)


def _output_tile(m: int, n: int, k: int, itemsize: int, shared: int, cols: int, wide: int) -> Tile:
    """Two products of one A slab, n columns of each: 128 x `wide` if that makes programs enough."""
    large = itemsize == 2 and -(-m // 128) * -(-n // wide) >= LARGE_PROGRAMS
    rows = 128 if large else 64 if itemsize == 2 else 32
    cols = min(wide if large else cols, max(16, 1 << (n - 1).bit_length()))
    warps = 8 if rows >= 128 else 4
    # With 64 columns of K in registers the large tile spills where products read registers.
    deep = itemsize == 2 and not (large and cols == 128 and shared < WGMMA_SHARED)
    depth = 64 if deep else 32
    while depth > max(16, k):
        depth //= 2
    tile = Tile(rows, cols, 2, depth, warps, stages=1)
    stages = min(4, (shared - SCRATCH_BYTES) // tile.stage_bytes(itemsize))
    return Tile(rows, cols, 2, depth, warps, max(1, stages))


def attention_tile(
    tokens: int, head_dim: int, itemsize: int, shared: int, rotate: bool = False
) -> Tile:
    """rows are queries, cols keys a step; depth is the head dimension.

    Up to 128 tokens in bf16 a program has a whole head, and one step.
    """
    longest = max(16, 1 << (tokens - 1).bit_length())
    rows, cols = (longest, longest) if longest <= 128 else (128, 64)
    if itemsize == 4:
        rows, cols = min(rows, 32), min(cols, 32)
    # K and V of one step, and its rows of cos and sin
    step = 2 * cols * head_dim * (itemsize + 4 * rotate)
    held = rows * head_dim * itemsize
    stages = max(1, min(3, (shared - SCRATCH_BYTES - held) // step))
    return Tile(rows, cols, 1, head_dim, 8 if rows == 128 else 4, stages)


def options(tile: Tile) -> dict[str, object]:
    """Compiler options; a*b+c fusion is named because its default differs between versions."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
