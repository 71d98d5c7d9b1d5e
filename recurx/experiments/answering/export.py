"""`python -m recurx export CHECKPOINT FILE.onnx`: a supervision step, or a call of a net, alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recurx.errors import bad_argument
from recurx.options import option


@dataclass(frozen=True)
class Options:
    checkpoint: str = option("", "official .pt, or .safetensors", flag="")
    out: str = option("", "the ONNX file to write", flag="", metavar="FILE.onnx")
    batch: int = option(1, "samples, which the file fixes", least=1)
    net: str | None = option(None, "not the step, a call of this net alone (L, of an HRM also H): "
                             "what it reads [B, T, D] as `h`, and `new_h`")  # fmt: skip


def run(asked: Options) -> int:
    import recurx

    # Engines on CPUs take fp32, and round it to bf16 themselves if they are told to.
    model = recurx.load_checkpoint(asked.checkpoint, forward_dtype="float32").build()
    if asked.net is None:
        recurx.export_onnx(model, asked.out, asked.batch)
    else:
        export_net(model, asked.net, asked.out, asked.batch)
    print(f"written: {asked.out}")
    return 0


def export_net(model: Any, net: str, path: str, batch_size: int) -> None:
    """Write one call of a net of the schedule, its rotary tables as constants.

    Raises:
        InvalidArgument: no such net; or onnx and onnxscript are missing.
    """
    import torch

    from recurx.onnx_export import write

    nets = model.inner.nets()
    if net not in nets:
        raise bad_argument("export", "--net", f"one of {', '.join(nets)}", repr(net))

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.inner

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return self.inner.nets()[net](h, self.inner.cos_sin())

    example = next(iter(model.inner.empty_carry(batch_size).values()))
    write(Call().eval(), (example,), path, ["h"], ["new_h"])
