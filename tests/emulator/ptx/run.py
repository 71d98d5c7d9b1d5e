"""Build PTX for the emulator: a kernel alone, or in the place of the C++ that csrc/cuda launches.

kernel = PtxKernel(ptx, "linear_residual_rms_kernel")
kernel.configure(seed=3, race=1)
kernel.launch(grid=(4,), block=(128,), shared=65536, arguments=[a, w, out, 97])
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path

from ..build import KERNELS, Emulated, build, cache_folder
from .parser import parse
from .translate import translate

HERE = Path(__file__).parent
# Generated code is long and runs little of its time in itself: -O1 compiles three times faster.
FLAGS = ("-O1", "-g0", "-w")


class PtxKernel:
    """One entry of a PTX module, built for the emulator."""

    def __init__(self, ptx: str, name: str | None = None) -> None:
        entries = {entry.name: entry for entry in parse(ptx).entries}
        if name is None and len(entries) != 1:
            raise ValueError(f"name one of the entries {list(entries)}")
        self.entry = entries[name or next(iter(entries))]
        flags = (*FLAGS, "-DPTX_STANDALONE")
        path = build([_source(translate(ptx))], checked=False, flags=flags)
        self.library = Emulated(path, checked=True)
        # Triton fences in the threads that read, after the barrier; PTX's memory model allows it.
        self.configure(reader_may_fence=1)

    def configure(self, **settings: float) -> None:
        """seed, async (0 eager, 1 lazy, 2 random), random_order, race, yield_chance, workers."""
        self.library.configure(**settings)

    def launch(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: list[object],
        shared: int = 0,
        cluster: int = 1,
    ) -> None:
        """Run the kernel; raises EmulatorFault with the emulator's report.

        Arguments are tensors or arrays (their address is passed), ints, floats or bytes, in the
        order of the PTX parameters; trailing parameters that are left out are zero (Triton's
        scratch pointers).
        """
        constants = pack_parameters(self.entry, arguments)
        three = ctypes.c_uint * 3
        pad = (1, 1, 1)
        self.library.call(
            f"ptx_launch_{self.entry.name}",
            three(*(*grid, *pad)[:3]),
            three(*(*block, *pad)[:3]),
            ctypes.c_uint(cluster),
            ctypes.c_size_t(shared),
            constants,
        )


def pack_parameters(entry, arguments: list[object]) -> ctypes.Array:
    """The kernel's constant bank. 64-byte aligned, because a tensor map may lie in it."""
    if len(arguments) > len(entry.parameters):
        raise ValueError(f"{entry.name} has {len(entry.parameters)} parameters")
    size = entry.parameter_bytes
    storage = ctypes.create_string_buffer(size + 64)
    bank = (ctypes.c_uint8 * size).from_buffer(storage, -ctypes.addressof(storage) % 64)
    ends = [*list(entry.parameters.values())[1:], size]
    for (name, offset), end, value in zip(entry.parameters.items(), ends, arguments, strict=False):
        data = _encode(name, value)
        if len(data) > end - offset:
            raise ValueError(f"parameter {name} of {entry.name} holds {end - offset} bytes")
        bank[offset : offset + len(data)] = data
    return bank


def _encode(name: str, value: object) -> bytes:
    if hasattr(value, "data_ptr"):
        return struct.pack("<Q", value.data_ptr())
    if hasattr(value, "ctypes"):
        return struct.pack("<Q", value.ctypes.data)
    if isinstance(value, bytes):
        return value
    if isinstance(value, float):
        return struct.pack("<f", value)
    if isinstance(value, int):
        return struct.pack("<i" if -(2**31) <= value < 2**31 else "<q", value)
    raise TypeError(f"parameter {name}: {type(value)} cannot be passed to a kernel")


def load_ptx(ptx: Sequence[str], host_sources: Sequence[str | Path], wanted: str = "") -> Emulated:
    """Host code (files of csrc/cuda, or paths) that launches nvcc's PTX, not the C++ beside it.

    `wanted` is a regular expression for the entries to translate: a file holds many templates.
    """
    sources = [_source(translate(text, wanted)) for text in ptx]
    sources += [KERNELS / name for name in host_sources]
    return Emulated(build(sources, checked=False, flags=FLAGS), checked=True)


def _source(text: str) -> Path:
    """Generated C++ with its header in a folder of its own: builds are keyed by folder."""
    files = {"kernel.cpp": text, "ptx_support.h": (HERE / "ptx_support.h").read_text()}
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()[:20]
    folder = cache_folder() / f"ptx-{digest}"
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if not (folder / name).exists():
            (folder / name).write_text(content)
    return folder / "kernel.cpp"
