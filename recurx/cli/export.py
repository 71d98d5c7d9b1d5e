"""`python -m recurx export CHECKPOINT FILE.onnx`: one supervision step for other engines."""

from __future__ import annotations

from dataclasses import dataclass

from recurx.options import option


@dataclass(frozen=True)
class Options:
    checkpoint: str = option("", "official .pt, or .safetensors", flag="")
    out: str = option("", "the ONNX file to write", flag="", metavar="FILE.onnx")
    batch: int = option(1, "samples, which the file fixes", least=1)


def run(asked: Options) -> int:
    import recurx

    # Engines on CPUs take fp32, and round it to bf16 themselves if they are told to.
    loaded = recurx.load_checkpoint(asked.checkpoint, forward_dtype="float32")
    recurx.export_onnx(loaded.build(), asked.out, asked.batch)
    print(f"written: {asked.out}")
    return 0
