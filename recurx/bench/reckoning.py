"""What the cost model predicts for a GPU, beside what readers of the kernels reckoned by hand.

Neither was measured: both are models, and the table shows where they differ. The hand's figures are
for an H100 or H200, from counts of instructions, bytes and waves: those of the kernels as they were
read, those that redesigns of them would reach, and those of PyTorch's operators one by one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from recurx.bench.cases import CASES
from recurx.bench.problems import problem_of_config
from recurx.plan import DEVICES, LaunchPlan, cost
from recurx.plan.launch import all_candidates

DEVICE = DEVICES["h200"]


@dataclass(frozen=True)
class ByHand:
    """Reckoned milliseconds of a supervision step: (least, most) each.

    Args:
        plan: "backend/kind".
        read: of its kernels as they were read.
        redesigned: of the best plan after the redesigns; () where that is another's row.
        eager: of PyTorch.
    """

    case: str
    batch: int
    plan: str
    read: tuple[float, float]
    redesigned: tuple[float, ...] = ()
    eager: tuple[float, ...] = ()

    def model(self, plan: str) -> float:
        """Predicted milliseconds of the best plan of a kind."""
        backend, kind = plan.split("/")
        problem = problem_of_config(CASES[self.case].make(), self.batch, "cuda")
        plans = [p for p in all_candidates(problem, DEVICE, backend) if p.kind == kind]
        return 1e3 * min(plan.seconds(DEVICE) for plan in plans)

    def is_picked(self) -> bool:
        """Whether the model predicts it to be the fastest of all."""
        problem = problem_of_config(CASES[self.case].make(), self.batch, "cuda")
        picked = LaunchPlan.pick(problem, DEVICE)
        return self.plan == f"{picked.backend}/{picked.kind}"


ROWS = (
    ByHand("trm-att", 1, "cuda/grid", (0.75, 0.95), (0.45, 0.5), (9, 10)),
    ByHand("trm-att", 8, "triton/tiled", (1.9, 2.8), (0.8, 1.2), (10, 10)),
    ByHand("trm-att", 64, "cuda/cluster", (4.0, 5.2), (3.4, 3.7), (11, 14)),
    ByHand("trm-att", 512, "cuda/cluster", (32, 41), (25, 30), (80, 90)),
    ByHand("trm-att", 512, "cuda/owner", (38, 46)),
    ByHand("trm-att", 512, "triton/tiled", (42, 55)),
    ByHand("trm-att", 512, "triton/library", (37, 37)),
    ByHand("arc", 64, "triton/tiled", (44, 44), (31, 31), (84, 84)),
)


# Of the second table: Hopper, and cards where a block has 99 KB of shared memory.
CARDS = ("h100", "h200", "rtx4090", "l40s")
BATCHES = (1, 64, 512)


def table() -> str:
    """The rows as Markdown, * marks what the model would pick; and the plans of some cards."""
    columns = ["case", "B", "plan", "model", "by hand", "redesigned, by hand", "eager, model"]
    columns += ["eager, by hand"]
    lines = [columns, ["---"] * len(columns)]
    for row in ROWS:
        eager = f"{row.model('eager/operators'):.3g}" if row.eager else ""
        lines.append(
            [
                row.case, str(row.batch), row.plan + " *" * row.is_picked(),
                f"{row.model(row.plan):.3g}", _range(row.read), _range(row.redesigned), eager,
                _range(row.eager),
            ]
        )  # fmt: skip
    return "\n\n".join([_markdown(lines), launches(), _markdown(plans())])


def plans() -> list[list[str]]:
    """Cells of the CUDA kernel that is predicted fastest for TRM-att on CARDS."""
    columns = ["card", "B", "plan", "ms, model", "busy", "GB through L2", "GB, shared memory"]
    lines = [[*columns, "limited by"], ["---"] * (len(columns) + 1)]
    for name, batch in itertools.product(CARDS, BATCHES):
        problem = problem_of_config(CASES["trm-att"].make(), batch, "cuda")
        costs, device = cost(problem, name), DEVICES[name]
        plan = costs["cuda"]
        work, parts = plan.work, plan.work.parts(device)
        lines.append(
            [
                name, str(batch), f"cuda/{plan.kind}" + " *" * (plan == costs.plans[0]),
                f"{1e3 * plan.seconds(device):.3g}",
                f"{min(work.parallel, device.units):.0f} of {device.units}",
                f"{work.l2_bytes / 1e9:.3g}", f"{work.shared_bytes / 1e9:.3g}",
                max(parts, key=parts.__getitem__),
            ]
        )  # fmt: skip
    return lines


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def launches() -> str:
    """How many kernels and copies a supervision step of TRM-att, B = 1, is, by plan."""
    problem = problem_of_config(CASES["trm-att"].make(), 1, "cuda")
    found = {f"{p.backend}/{p.kind}": p.work.launches for p in all_candidates(problem, DEVICE)}
    listed = ", ".join(f"{count:,.0f} in `{name}`" for name, count in found.items())
    return f"Kernels and copies of one step of `trm-att` at B = 1: {listed}."


def _range(values: tuple[float, ...]) -> str:
    return "-".join(f"{value:g}" for value in dict.fromkeys(values))
