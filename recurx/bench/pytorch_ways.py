"""The ways in which PyTorch runs a model that recurx is compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recurx.models import RecursiveModel

Outputs = dict[str, Tensor]  # of the first step: what is compared with the reference


def compile_nets(model: RecursiveModel, options: dict[str, str], dynamic: bool) -> None:
    """Each net of the model as one compiled call.

    NOTE: a whole step as one graph unrolls to 21 calls, which takes minutes to compile on two cores
    and runs no faster on a CPU.
    """
    inner = model.inner
    tables = inner.cos_sin()
    # A partial hides the module's layers, so that `recurse` calls it instead of looking inside.
    nets = {
        name: functools.partial(
            torch.compile(net, dynamic=dynamic or None, **options), cos_sin=tables
        )
        for name, net in inner.nets().items()
    }
    assert not inner.dropped, "modules that are compiled do not drop"
    inner.nets = lambda training=False: nets  # type: ignore[method-assign, assignment]


def freeze() -> None:
    """Let the compiler treat weights as constants, in this process."""
    import torch._inductor.config as inductor

    inductor.freezing = True


def capture(step: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """`step` as one CUDA graph: its replay, and the (static) results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # lazy initialisation must not be captured
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results
