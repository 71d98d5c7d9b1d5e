"""`LaunchPlan`: one way to run a problem, as a printable value; and the one selector."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from recurx.errors import BackendUnavailable
from recurx.hashing import hash_once
from recurx.plan.device import Device
from recurx.problem import Problem

Setting = int | float | str | bool
# Share of the cycles of shared memory that waits, softmax and epilogues leave to the operands of
# products: reckoned from the code of the cluster kernel, phase by phase, not measured.
SHARED = 0.85


@dataclass(frozen=True)
class Work:
    """What a plan makes a device do for one recursion.

    Args:
        flops: FLOPs that the mathematics asks for.
        padded_flops: FLOPs that the tiles do, padding included; and those that a kernel which waits
            for L2 could do meanwhile, where a plan is a row of kernels.
        dram_bytes, l2_bytes: bytes moved from and to device memory, and from and to L2.
        shared_bytes: bytes of operands from and to shared memory, of all multiprocessors.
        vector_flops: work on single values (exponentials, norms), as FLOPs at the rate of fp32
            products; 0 where the plan's efficiency has it in.
        launches: kernels (GPU) or operators (CPU).
        barriers: barriers over all units.
        splits: PyTorch operators that a CPU splits over its threads.
        parallel: units (multiprocessors, threads) that it keeps busy at once.
        itemsize: bytes of a product's operands, which selects the rate.
        efficiency: share of the device's rate that the inner loop can reach.
        bandwidth: share of the device's bandwidth that its accesses to memory reach.
        overlap: whether products and memory traffic run at the same time; operators one after the
            other, each bound by its own limit, do not.
        from_python: each launch comes from Python by itself, not from a graph or a single call.
            On a GPU they run ahead of the device, so the slower of the two decides.
    """

    flops: float
    padded_flops: float
    dram_bytes: float
    l2_bytes: float
    launches: float
    barriers: float = 0
    parallel: float = float("inf")
    itemsize: int = 2
    efficiency: float = 1.0
    bandwidth: float = 1.0
    vector_flops: float = 0
    overlap: bool = True
    from_python: bool = False
    splits: float = 0
    shared_bytes: float = 0

    def parts(self, device: Device) -> dict[str, float]:
        """Seconds of each limit on `device`, by its name."""
        busy = min(1.0, self.parallel / device.units)
        launch = device.call_us if self.from_python else device.launch_us
        return {
            "products": self.padded_flops / (device.flops(self.itemsize) * busy * self.efficiency),
            "vectors": self.vector_flops / (device.flops(4) * busy),
            "dram": self.dram_bytes / (device.dram_gbs * 1e9 * self.bandwidth),
            "l2": self.l2_bytes / (device.l2_gbs * 1e9 * busy),
            "shared": self.shared_bytes / (device.shared_gbs * 1e9 * busy * SHARED),
            "launches": (self.launches * launch + self.splits * device.split_us) * 1e-6,
            "barriers": self.barriers * device.barrier_us * 1e-6,
        }

    def seconds(self, device: Device) -> float:
        """Predicted time: the largest of products and traffic (their sum without overlap), and
        what nothing hides: barriers, and on a CPU or in a graph launches."""
        parts = self.parts(device)
        waiting = parts.pop("launches") + parts.pop("barriers")
        parts["products"] = max(parts["products"], parts.pop("shared"))  # its operands
        working = max(parts.values()) if self.overlap else sum(parts.values())
        if self.from_python and device.kind == "cuda":
            return max(waiting, working + 1e-6 * self.launches * device.launch_us)
        return waiting + working


@hash_once
@dataclass(frozen=True)
class LaunchPlan:
    """One way to run one problem on one device.

    Args:
        backend: name of the backend that runs it.
        kind: which of the backend's ways, e.g. "persistent" or "tiled".
        settings: every size that a launch needs, as (name, value) pairs.
        work: what it makes the device do.
        why: one sentence: what the plan is for.
    """

    backend: str
    kind: str
    settings: tuple[tuple[str, Setting], ...]
    work: Work
    why: str

    def __getitem__(self, name: str) -> Setting:
        return dict(self.settings)[name]

    def seconds(self, device: Device) -> float:
        """Predicted seconds of the recursion on `device`."""
        return self.work.seconds(device)

    def order(self, device: Device) -> tuple[object, ...]:
        """What plans are sorted by: predicted time; of equal ones, less traffic through L2."""
        seconds = self.seconds(device)
        return float(f"{seconds:.6g}"), self.work.l2_bytes, self.backend, self.kind, self.settings

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings)
        return f"{self.backend}/{self.kind}({settings}): {self.why}"

    @classmethod
    def pick(
        cls, problem: Problem, device: Device | None = None, backend: str | None = None
    ) -> LaunchPlan:
        """The plan with the least predicted time, of one backend or of all.

        Args:
            problem: what to run.
            device: where; None for the device of the problem's type in this machine.
            backend: one name, also "name/kind", or None for every backend that has plans.

        Raises:
            BackendUnavailable: no plan fits; the message gives the reason of each kind.
        """
        device = Device.of(problem.device_type) if device is None else device
        plans = all_candidates(problem, device, backend)
        if not plans:
            reasons = "; ".join(all_refusals(problem, device, backend)) or "it has none for it"
            raise BackendUnavailable(
                f"recurx.LaunchPlan.pick: no plan of backend {backend or 'any'!r} runs {problem} "
                f"on {device.name}: {reasons}."
            )
        return min(plans, key=lambda plan: plan.order(device))


# The files of this package that hold a backend's candidates; each is imported when it is asked.
BACKENDS = ("cuda", "cpu", "triton", "eager")


def all_candidates(
    problem: Problem, device: Device, backend: str | None = None
) -> list[LaunchPlan]:
    """The plans that fit `device`, of one backend ("triton", or a kind: "triton/library") or of
    all; none for no tokens at all."""
    if problem.tokens == 0:
        return []
    plans = (plan for file in _files(backend) for plan in file.candidates(problem, device))
    kind = (backend or "").partition("/")[2]
    return [plan for plan in plans if kind in ("", plan.kind)]


def all_refusals(problem: Problem, device: Device, backend: str | None = None) -> list[str]:
    """One sentence for each kind of plan that does not fit."""
    if problem.tokens == 0:
        return ["no plan is made for T=0 tokens"]
    return [reason for file in _files(backend) for reason in file.refusals(problem, device)]


def _files(backend: str | None) -> list[ModuleType]:
    names = BACKENDS if backend is None else (backend.partition("/")[0],)
    return [importlib.import_module(f"recurx.plan.{name}") for name in names]
