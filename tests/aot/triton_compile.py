"""Compile a Triton kernel for an architecture that is not here, and keep what ptxas said."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from aot.toolchain import Built, cached

_POINTERS = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32",
    torch.uint8: "*u8",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    built: Built
    name: str
    ptx: str
    shared: int  # dynamic shared memory, bytes
    warps: int


def compile_kernel(
    kernel, arguments: Sequence, constants: Mapping, options: Mapping, arch: str
) -> Compiled:
    """`kernel` as it would be launched with these arguments (tensors may be empty or on meta).

    Assembled by Triton's own ptxas; cached by everything that goes in.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = _describe(kernel, arguments, constants)
    constants = {**dict.fromkeys(n for n in signature if signature[n] == "constexpr"), **constants}
    recipe = (triton.__version__, kernel.cache_key, signature, attributes, constants, options)
    path = cached("triton", ".json", arch, *recipe)
    if not path.exists():
        source = ASTSource(
            fn=kernel, signature=signature, constexprs=dict(constants), attrs=attributes
        )
        target = GPUTarget("cuda", int(arch), 32)
        with _always_compiling(), contextlib.redirect_stdout(io.StringIO()) as log:
            made = triton.compile(source, target=target, options=dict(options))
        path.with_suffix(".cubin").write_bytes(made.asm["cubin"])
        fields = {"ptx": made.asm["ptx"], "log": log.getvalue(), "name": made.metadata.name}
        fields |= {"shared": made.metadata.shared, "warps": made.metadata.num_warps}
        path.write_text(json.dumps(fields))
    fields = json.loads(path.read_text())
    return Compiled(built=Built(path.with_suffix(".cubin"), fields.pop("log")), **fields)


@contextlib.contextmanager
def _always_compiling() -> Iterator[None]:
    """Triton prints ptxas's report only when it really runs it, and only when told to."""
    from triton import knobs

    with knobs.compilation.scope(), knobs.nvidia.scope():
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        yield


def _describe(kernel, arguments: tuple, constants: dict) -> tuple[dict, dict]:
    """Triton's (signature, attributes) for these arguments, as its launcher would specialise."""
    parameters = list(inspect.signature(kernel.fn).parameters)
    signature: dict[str, str] = dict.fromkeys(parameters, "constexpr")
    attributes = {}
    for name, value in zip((n for n in parameters if n not in constants), arguments, strict=True):
        if value is None:  # as its launcher does, no part of the kernel
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        # PyTorch's allocator aligns to 512 bytes, so every pointer is a multiple of 16.
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(parameters.index(name),)] = [["tt.divisibility", 16]]
    return signature, attributes
