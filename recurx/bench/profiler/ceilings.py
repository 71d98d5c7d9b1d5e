"""The ceilings that a roofline is drawn from, measured on the profiled device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recurx import measure

# The profiled model may have filled a GPU: half a GB in all.
SMALLER_COPY, SMALLER_SIDE = 256 << 20, 4096


@dataclass(frozen=True)
class Ceilings:
    """The roofline of a device: GB/s of a large copy, TFLOP/s of square products."""

    gbs: float
    tflops: dict[str, float]  # dtype -> TFLOP/s

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Ceilings:
        """Measured on `device`, the products in fp32 and in `dtype`."""
        side = min(measure.LARGE.get(device.type, SMALLER_SIDE), SMALLER_SIDE)
        tflops = {
            str(kind).removeprefix("torch."): measure.product_tflops(side, side, side, kind, device)
            for kind in dict.fromkeys((torch.float32, dtype))
        }
        nbytes = min(measure.COPY_BYTES.get(device.type, SMALLER_COPY), SMALLER_COPY)
        return cls(measure.copy_gbs(device, nbytes), tflops)

    @property
    def best_tflops(self) -> float:
        return max(self.tflops.values())

    def bound(self, flops: float, moved: float) -> float:
        """Least seconds for `flops` FLOPs and `moved` bytes."""
        return max(flops / (self.best_tflops * 1e12), moved / (self.gbs * 1e9))
