"""The wrapper kernels of wrappers/*.cu: run them, and what each must write, worked out in numpy.

    python -m emulator.wrapper_cases --write OUT.npz    # the words, as kept in tests/golden
    python -m emulator.wrapper_cases sm90.cu dsmem      # one of them, ten seeds, outcomes as JSON

The expectations here know nothing of the emulator; the golden words let a machine with a GPU
compare its own with the emulator's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .build import Emulated, EmulatorFault, build, last_error

FOLDER = Path(__file__).parent / "wrappers"
FILES = ("sm80.cu", "sm90.cu", "sm90a.cu")
GOLDEN = Path(__file__).parents[1] / "golden" / "wrappers.npz"
Words = np.ndarray


def load(file: str, checked: bool = True, folder: Path = FOLDER) -> Emulated:
    return Emulated(build([folder / file, FOLDER / "errors.cu"], checked), checked)


def names(library: ctypes.CDLL) -> list[str]:
    library.rx_wrapper_name.restype = ctypes.c_char_p
    return [library.rx_wrapper_name(i).decode() for i in range(library.rx_wrapper_count())]


def run(emulated: Emulated, name: str) -> Words:
    """The words that a wrapper kernel writes; what it leaves alone is 0xffffffff."""
    library = emulated.library
    index = names(library).index(name)
    out = np.full(library.rx_wrapper_words(index) + 64, 0xFFFFFFFF, np.uint32)
    start = -out.ctypes.data % 256 // 4  # bulk copies want 16-byte alignment
    words = out[start : start + library.rx_wrapper_words(index)]
    emulated.unwatch_all()  # global memory too is checked for races
    emulated.watch(words.ctypes.data, words.nbytes, "out_g")
    if library.rx_wrapper_run(index, ctypes.c_void_p(words.ctypes.data), None):
        raise EmulatorFault(last_error(library))
    return words


def outcome(emulated: Emulated, name: str) -> str:
    """'right', or what was found."""
    try:
        wrong = int((run(emulated, name) != EXPECTED[name]()).sum())
    except EmulatorFault as fault:
        return str(fault)
    return f"{wrong} words are wrong" if wrong else "right"


# ---------------------------------------------------------------- what each must write


def small(i: np.ndarray) -> np.ndarray:
    return ((i.astype(np.uint64) * 2654435761 % 2**32) >> 20).astype(np.int64) % 9 - 4


def as_words(x: np.ndarray) -> Words:
    return np.ascontiguousarray(x, np.float32).view(np.uint32).ravel()


def pairs(low: np.ndarray, high: np.ndarray) -> Words:
    return (low.astype(np.uint32) | high.astype(np.uint32) << 16).astype(np.uint32)


LANE = np.arange(32)


def ldmatrix(matrices: int, trans: bool) -> Words:
    tile = np.arange(256).reshape(16, 16)
    out = np.zeros((32, 4), np.uint32)
    for m in range(matrices):
        block = tile[m % 2 * 8 : m % 2 * 8 + 8, m // 2 * 8 : m // 2 * 8 + 8]
        flat = (block.T if trans else block).reshape(32, 2)
        out[:, m] = pairs(flat[:, 0], flat[:, 1])
    return out.ravel()


def mma(*times: int) -> Words:
    """`times`: how often each of the four tiles gets the product."""
    a = small(np.arange(512)).reshape(32, 16)
    b = small(1000 + np.arange(256)).reshape(16, 16)
    product = a @ b
    out = np.zeros((32, 4, 4))
    for lane in range(32):
        for tile in range(4):
            out[lane, tile] = 100 * tile + lane + np.arange(4)
            rows = tile // 2 * 16 + lane // 4 + np.array([0, 0, 8, 8])
            columns = tile % 2 * 8 + lane % 4 * 2 + np.array([0, 1, 0, 1])
            out[lane, tile] += times[tile] * product[rows, columns]
    return as_words(out)


def cp_async_source() -> Words:
    return (np.arange(1, 65, dtype=np.uint64) * 0x01000100).astype(np.uint32)


def cp_async(size: int) -> Words:
    data = cp_async_source().view(np.uint8)[: 16 * size].reshape(16, size).copy()
    data[2::4, size // 2 :] = 0
    data[3::4] = 0
    return np.concatenate([cp_async_source(), data.ravel().view(np.uint32)])


def named_barrier() -> Words:
    second = 100 + 31 - LANE
    return np.concatenate([second[LANE ^ 1] * 2, second]).astype(np.uint32)


def bf16() -> Words:
    rounded = [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x0000, 0x8002, 0x7F80, 0xBF81]
    out = np.zeros((8, 3), np.uint32)
    out[:, 0] = np.array(rounded) | 0xBFC0 << 16
    out[:, 1] = (0xC000 + np.arange(8)) << 16
    out[:, 2] = 0x3FC0 << 16
    return out.ravel()


def grid_barrier() -> Words:
    written = 100 * np.arange(4)[:, None] + LANE
    return np.r_[written.ravel(), np.roll(written, -1, 0)[:, ::-1].ravel(), 4].astype(np.uint32)


def dsmem(ctas: int) -> Words:
    rank, t = (x.ravel() for x in np.meshgrid(np.arange(ctas), LANE, indexing="ij"))
    beyond = (rank + 1) % ctas
    out = np.zeros((32 * ctas, 10), np.uint32)
    out[:, :4] = np.stack([beyond * 1000 + t, t, beyond, t * t], 1)
    out[:, 4] = (beyond * 1000 + 31 - t).astype(np.uint32)  # the bits of a word read as float
    out[:, 5] = as_words((rank - 2) % ctas * 100 + t)
    sender = (rank - 3) % ctas  # it sent what it had read from its own neighbour
    out[:, 6:] = np.stack([sender, t, (sender + 1) % ctas * 1000 + t, t * t], 1)
    return out.ravel()


def mbarrier(ctas: int, rounds: int) -> Words:
    number = [0.0] * ctas
    for step in range(ctas * rounds - 1):
        rank = step % ctas
        number[(rank + 1) % ctas] = number[rank] * 2 + rank
    return as_words(np.array(number))


def bulk_source(count: int = 256) -> Words:
    return (np.arange(1, count + 1, dtype=np.uint64) * 0x01000193).astype(np.uint32)


def bulk(ctas: int = 2, numbered: int = 0) -> Words:
    """The source, then what each CTA got: from the one before it, which added its rank."""
    a = bulk_source()
    return np.concatenate([a, *(a + np.uint32(numbered * ((r - 1) % ctas)) for r in range(ctas))])


def bulk_hand_back(ctas: int) -> Words:
    rounds = (np.arange(4)[:, None] * 1000 + np.arange(256)).ravel().astype(np.uint32)
    return np.tile(rounds, ctas - 1)


def bulk_store() -> Words:
    return (np.arange(256) ** 2).astype(np.uint32)


def tensor(multicast: bool) -> Words:
    source = (np.arange(1, 1441, dtype=np.uint64) * 0x00030001).astype(np.uint32)
    matrix = np.zeros((40 + 32, 72 + 128), np.uint16)
    matrix[16:56, 64:136] = source.view(np.uint16).reshape(40, 72)

    def box(x: int, y: int) -> Words:
        rows = matrix[16 + y : 32 + y, 64 + x : 128 + x].reshape(16, 8, 8)
        order = np.arange(8)[None, :] ^ (np.arange(16) % 8)[:, None]
        return np.take_along_axis(rows, order[:, :, None], 1).reshape(-1).view(np.uint32)

    first, second = box(-8, -4), box(16, 32)
    rest = np.full(512, 0xFFFFFFFF, np.uint32)
    boxes = [first, second, first, second] if multicast else [first, rest, second, rest]
    return np.concatenate([source, *boxes])


def stmatrix() -> Words:
    tile = np.zeros((16, 8), np.uint32)
    for m in range(4):
        rows, columns = m % 2 * 8 + LANE // 4, m // 2 * 4 + LANE % 4
        tile[rows, columns] = (LANE * 4 + m) * 0x00020001
    return tile.ravel()


def stmatrix_trans() -> Words:
    tile = np.zeros((16, 16), np.uint16)
    for m in range(4):
        for e in range(2):
            rows, columns = m % 2 * 8 + LANE % 4 * 2 + e, m // 2 * 8 + LANE // 4
            tile[rows, columns] = (LANE * 4 + m) * (1 + e)
    return tile.view(np.uint32).ravel()


def fragment_of(full: np.ndarray) -> np.ndarray:
    """[64, N] as the threads of a warpgroup hold it: [128, N / 2]."""
    n = full.shape[1]
    t, i = np.arange(128)[:, None], np.arange(n // 2)[None, :]
    rows = t // 32 * 16 + t % 32 // 4 + i % 4 // 2 * 8
    return full[rows, i // 4 * 8 + t % 4 * 2 + i % 2]


def wgmma(n: int) -> Words:
    a = small(np.arange(64 * 64)).reshape(64, 64)
    b = small(5000 + np.arange(n * 64)).reshape(n, 64)
    out = (a @ b.T).astype(np.float64)
    t, i = np.arange(128)[:, None], np.arange(n // 2)[None, :]
    rows = t // 32 * 16 + t % 32 // 4 + i % 4 // 2 * 8
    out[rows, i // 4 * 8 + t % 4 * 2 + i % 2] += t + i
    return as_words(out)


def wgmma_setmaxnreg() -> Words:
    a = small(np.arange(64 * 64)).reshape(64, 64)[:, :16]
    fresh = fragment_of((a @ a.T).astype(np.float64))
    return as_words(np.concatenate([fresh, fresh + 1000], 1))


EXPECTED: dict[str, Callable[[], Words]] = {
    "ldmatrix_x4": lambda: ldmatrix(4, False),
    "ldmatrix_x4_trans": lambda: ldmatrix(4, True),
    "ldmatrix_x2": lambda: ldmatrix(2, False),
    "mma_m16n8k16": lambda: mma(1, 0, 0, 0),
    "mma_m16n16k16": lambda: mma(1, 1, 0, 0),
    "mma_m32n8k16": lambda: mma(1, 0, 1, 0),
    "mma_m32n16k16": lambda: mma(1, 1, 1, 1),
    "mma_all_shapes": lambda: mma(4, 2, 2, 1),
    **{f"cp_async_{n}": (lambda n=n: cp_async(n)) for n in (4, 8, 16)},
    "cp_async_groups": lambda: np.concatenate([cp_async_source()] * 2),
    "named_barrier": named_barrier,
    "bf16": bf16,
    "scratch": lambda: np.concatenate([np.arange(64) * 3, np.arange(63, -1, -1) * 3]).astype("u4"),
    "grid_barrier": grid_barrier,
    "dsmem": lambda: dsmem(4),
    "dsmem_8": lambda: dsmem(8),
    "mbarrier": lambda: mbarrier(4, 3),
    "mbarrier_8": lambda: mbarrier(8, 2),
    "bulk_load": bulk,
    **{
        f"{name}{suffix}": (lambda make=make, ctas=ctas: make(ctas))
        for ctas, suffix in ((2, ""), (4, "_4"), (8, "_8"))
        for name, make in (
            ("bulk_load_multicast", bulk),
            ("bulk_to_cluster", lambda ctas: bulk(ctas, 1)),
            ("bulk_hand_back", bulk_hand_back),
        )
    },
    "bulk_store": bulk_store,
    "bulk_scratch": lambda: 7 * np.r_[np.arange(256), np.arange(255, -1, -1)].astype("u4"),
    "tensor_load_2d": lambda: tensor(False),
    "tensor_load_2d_multicast": lambda: tensor(True),
    "stmatrix_x4": stmatrix,
    "stmatrix_x4_trans": stmatrix_trans,
    **{
        f"wgmma_{n}{form}": (lambda n=n: wgmma(n))
        for n in (32, 64, 128, 192, 256)
        for form in ("", "_registers", "_transposed")
        if (n, form) not in ((192, "_transposed"), (256, "_transposed"))
    },
    "wgmma_32_transposed_high": lambda: wgmma(32),
    "wgmma_128_transposed_a": lambda: wgmma(128),
    "wgmma_64_swizzle_64b": lambda: wgmma(64),
    "wgmma_128_swizzle_64b": lambda: wgmma(128),
    "wgmma_256_swizzle_64b": lambda: wgmma(256),
    "wgmma_64_swizzle_32b": lambda: wgmma(64),
    "wgmma_256_swizzle_32b": lambda: wgmma(256),
    "wgmma_setmaxnreg": wgmma_setmaxnreg,
}


def all_words() -> Iterator[tuple[str, Words]]:
    for file in FILES:
        emulated = load(file)
        for name in names(emulated.library):
            yield name, run(emulated, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", choices=FILES)
    parser.add_argument("name", nargs="?", choices=EXPECTED)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="a copy of wrappers/")
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    if args.write:
        np.savez_compressed(args.write, **dict(all_words()))
        return
    emulated = load(args.file, folder=args.folder)
    outcomes = []
    for seed in range(1, args.seeds + 1):
        emulated.configure(seed=seed)
        outcomes.append(outcome(emulated, args.name))
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
