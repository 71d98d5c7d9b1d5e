"""What every clock of recurx needs."""

from __future__ import annotations

import torch


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that a clock shows its work and not its launches."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
