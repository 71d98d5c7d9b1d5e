"""Ways to run a case: PyTorch's own, and every backend that the registry knows."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from recurx.errors import bad_argument

YARDSTICK = "eager"  # its error in a dtype is what that dtype may cost
OURS = "recurx-"  # recurx-cpu, recurx-triton, ...: the backend's name follows


@dataclass(frozen=True)
class Way:
    """One way of PyTorch.

    Args:
        text: what it is.
        devices, modes: where it exists.
        compile: arguments of torch.compile; None where nothing is compiled.
        package: of a peer, another engine: it runs where this package is installed.
        dtypes: in which it runs.
    """

    text: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    modes: tuple[str, ...] = ("step", "train", "solve")
    compile: dict[str, str] | None = None
    package: str = ""
    dtypes: tuple[str, ...] = ("bf16", "fp32")

    @property
    def there(self) -> bool:
        return not self.package or importlib.util.find_spec(self.package) is not None


WAYS = {
    "eager": Way("as the official code runs: fp32 masters, cast on every call"),
    "eager-halt": Way("eager with early exit: finished puzzles leave the batch", modes=("solve",)),
    "compile": Way("torch.compile, default mode", compile={}),
    "reduce-overhead": Way(
        "torch.compile, mode reduce-overhead (CUDA graphs)", ("cuda",), ("step", "train"),
        {"mode": "reduce-overhead"},
    ),
    "max-autotune": Way(
        "torch.compile, mode max-autotune", ("cuda",), ("step", "train"), {"mode": "max-autotune"}
    ),
    "graph": Way(
        "eager, captured into one CUDA graph; in training with recurx's optimisers, which can be",
        ("cuda",), ("step", "train"),
    ),
    "tuned": Way(
        "weights cast beforehand, compiled with freezing and max-autotune", ("cpu",), ("step",),
        {"mode": "max-autotune-no-cudagraphs"},
    ),
    "openvino": Way(
        "OpenVINO, the step exported by recurx.export_onnx; bf16 by its precision hint",
        ("cpu",), ("step",), package="openvino",
    ),
    "onnxruntime": Way(
        "ONNX Runtime, the step exported by recurx.export_onnx",
        ("cpu",), ("step",), package="onnxruntime", dtypes=("fp32",),
    ),
    "zentorch": Way(
        "torch.compile by AMD's zentorch", ("cpu",), ("step",), {"backend": "zentorch"},
        package="zentorch",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A way or backend, in a dtype; prints and parses as `eager/bf16`, `recurx-cpu/fp32`."""

    engine: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.engine}/{self.dtype}"

    @property
    def ours(self) -> bool:
        """Whether a backend of recurx runs it."""
        return self.engine.startswith(OURS)

    @property
    def backend(self) -> str:
        """The backend of the recursion."""
        if not self.ours:
            return "eager"
        return self.engine.removeprefix(OURS)

    @property
    def captured(self) -> bool:
        """Whether eager is captured into one CUDA graph."""
        return self.engine == "graph"

    @property
    def way(self) -> Way | None:
        return WAYS.get(self.engine)


def engines(device: str, mode: str) -> list[str]:
    """Every engine for a type of device and a mode, recurx's first. The registry is asked."""
    from recurx import backends

    found = []
    for name in backends.ORDER:
        types = backends.get(name).device_types
        if name != "eager" and (not types or device in types):
            found.append(OURS + name)
    ways = (n for n, way in WAYS.items() if device in way.devices and mode in way.modes)
    return found + [name for name in ways if WAYS[name].there]


def check_engines(names: tuple[str, ...], device: str, mode: str) -> None:
    """Refuse a name that is no engine.

    Raises:
        InvalidArgument: the known ones are listed.
    """
    known = ["all", "recurx", "peers", *WAYS, *engines(device, mode)]
    for name in names:
        if name.partition("/")[0] not in known:
            raise bad_argument(
                "bench", "engine", f"one of {', '.join(dict.fromkeys(known))}", repr(name)
            )
