"""Tile sizes of the backward kernels, chosen as in tiles.py: from shape, storage type and shared
memory, never from a device's name.
"""

from __future__ import annotations

from .tiles import SCRATCH_BYTES, Chip, Tile

# Programs that the split of a weight gradient aims at: two for each of an H100's 132 SMs.
WGRAD_PROGRAMS = 264
WGMMA_SHARED = 200_000  # a block with more is one of sm_90 or sm_100 (tiles.SHARED_BYTES)
WGRAD_ROWS = 512  # fewest rows of one split: below it the partial sums cost more than the product


def _power(n: int) -> int:
    """The smallest power of two that is at least n, and 16: tl.dot takes no less."""
    return max(16, 1 << (n - 1).bit_length())


def _staged(
    rows: int, cols: int, chunks: int, depth: int, warps: int, itemsize: int, shared: int
) -> Tile:
    """The tile with as many pipeline stages as fit, 4 at most."""
    tile = Tile(rows, cols, chunks, depth, warps, stages=1)
    stages = min(4, (shared - SCRATCH_BYTES) // tile.stage_bytes(itemsize))
    return Tile(rows, cols, chunks, depth, warps, max(1, stages))


def swiglu_backward_tile(m: int, n: int, k: int, itemsize: int, chip: Chip) -> Tile:
    """rows x cols of three products (gate, up, d_mid), two of them over one slab of x."""
    narrow = itemsize == 4
    cols = min(32 if narrow else 64, _power(n))
    rows = 32 if narrow else 128 if -(-m // 128) * -(-n // cols) >= chip.units else 64
    depth = min(32 if narrow else 64, _power(k))
    warps = 8 if rows == 128 or narrow else 4
    return _staged(rows, cols, 2, depth, warps, itemsize, chip.shared)


def wgrad_tile(m: int, n: int, k: int, itemsize: int, shared: int) -> tuple[Tile, int]:
    """rows x cols of a weight gradient [n, k] over m rows, and into how many ranges m is cut.

    The cut follows from the shape alone, so a rerun adds in the same order.
    """
    largest = 64 if itemsize == 4 else 128
    rows, cols = min(largest, _power(n)), min(largest, _power(k))
    depth = min(32 if itemsize == 4 else 64, _power(max(1, m)))
    warps = 8 if rows * cols >= 128 * 128 else 4
    tiles = -(-n // rows) * -(-k // cols)
    split = max(1, min(-(-WGRAD_PROGRAMS // tiles), m // WGRAD_ROWS))
    return _staged(rows, cols, 1, depth, warps, itemsize, shared), split


def attention_backward_tile(
    tokens: int, head_dim: int, itemsize: int, shared: int
) -> tuple[Tile, bool]:
    """rows are the queries a step, cols the keys that a program owns (and the other way round); and
    whether a program that owns all keys of a head shall make d_q too.

    A block with less shared memory than an sm_90's multiplies from registers (mma.sync): there it
    takes fewer queries a step, and d_q beside 128 keys would spill.
    """
    narrow, roomy = itemsize == 4, shared >= WGMMA_SHARED
    longest = _power(tokens)
    owned = 128 if head_dim < 128 else 64 if roomy else 32
    step = 64 if roomy and head_dim < 128 else 32
    if narrow:
        owned, step = 32, 32
    rows, cols = min(longest, step), min(longest, owned)
    held = 2 * cols * head_dim * itemsize  # K and V
    bytes_a_step = 3 * rows * head_dim * itemsize  # Q, the output and its gradient
    stages = max(1, min(2, (shared - SCRATCH_BYTES - held) // bytes_a_step))
    tile = Tile(
        rows, cols, 1, head_dim, 8 if cols >= 64 or (narrow and head_dim == 128) else 4, stages
    )
    return tile, cols >= tokens and (roomy or cols <= 64)


def rms_tile(n: int, rows_are_contiguous: bool) -> Tile:
    """Whole rows of n columns; 32 of them where neighbours in memory are neighbouring rows."""
    cols = _power(n)
    rows = max(1, 4096 // cols)
    return Tile(max(rows, 32) if rows_are_contiguous else rows, cols, 1, 1, 4, 1)
