"""The options of `recurx.solve`, stated once for it and for the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recurx.options import option

if TYPE_CHECKING:
    from torch import Tensor

HALTS = ("q", "fixed-point", "any", "residual", "entropy", None)
INITS = ("learned", "random")
SELECTIONS = ("q", "vote", "residual")
Accepts = Callable[["Tensor", "Tensor"], "Tensor"]  # (inputs, answers [N, T]) -> [N] bool


@dataclass(frozen=True)
class Fill:
    """Blanks are filled in the order of confidence, and refinement begins anew after each filling.

    Every `steps` supervision steps of a row, its likeliest blank, and all blanks whose token has a
    probability over `above`, become part of the question. A net that is right about the easiest
    cells of a hard question meets easier questions from then on. A row ends one step after its last
    blank was filled, so that its q judges the whole answer; halting rules hold beside that.
    Source: decoding in the order of certainty, as masked diffusion models do it (arXiv 2502.06768,
    section 4).

    Args:
        blank: token id of a blank; answers use the ids of questions.
        above: probability.
        steps: supervision steps before each filling.
    """

    blank: int
    above: float = 0.99
    steps: int = 1


@dataclass(frozen=True)
class Search:
    """Search over tries by the rules of a task; see recurx/solving/search.py for how.

    An answer counts only if it keeps the givens and the rules. Where there is none, the sample's
    verdict in `Answers.verdicts` says why, and its prediction is padding:

        "solved"         the prediction keeps the rules; with `unique` it is the only such answer
        "contradictory"  the question has no answer: the rules refuted it, or all branches of it
        "ambiguous"      it has several (only `unique` looks for them)
        "budget"         none was found within `budget`, or not told within `positions`

    The net proves nothing: `rules.possible` refutes boards, and the exact solver of the task,
    `rules.count`, looks for a second answer. That solver would find the first one too.

    `rules` is a task of `recurx.tasks`, or whatever has its `accepts`, `blank`, `possible` and
    `count`. Without `blank` nothing is filled or branched: the question is tried again.
    """

    rules: Any
    starts: int = option(8, "search: tries at once of each board, but for the first", least=2,
                         most=2**12)  # fmt: skip
    pin: float = option(1.0, "search: share of these tries that must agree on a cell to fill it; "
                        "over 1, none is filled", metavar="SHARE")  # fmt: skip
    budget: int = option(64, "search: boards that the net is asked about for a puzzle", least=1,
                         most=2**16)  # fmt: skip
    forced: bool = option(False, "search: also fill cells in which the rules leave one value")
    unique: bool = option(False, "search: a puzzle must have one answer alone, which an exact "
                          "solver tells, where the task has one")  # fmt: skip
    positions: int = option(20_000, "search: positions that this solver looks at for a puzzle",
                            least=1)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """How rows are refined; each field is the argument of `recurx.solve` of that name, which tells
    more about it. The options among them are those of `eval` and `solve`."""

    max_steps: int = option(16, "steps a puzzle may take; may exceed those of training", least=1,
                            most=2**20)  # fmt: skip
    halt: str | None = option("q", "a puzzle ends when the model says so (q), when its answer "
                              "stays the same (fixed-point), at the first of both (any), when "
                              "its state (residual) or answer (entropy) is settled, or after all "
                              "steps (none)", choices=HALTS)  # fmt: skip
    halt_above: float = option(0.0, "q (logit of being right) that ends a puzzle: 0 is even odds, "
                               "3 is 20 to 1", metavar="Q")  # fmt: skip
    halt_below: float = option(0.05, "limit of residuals (relative change of the state in a step) "
                               "and entropies (in nats)", metavar="X")  # fmt: skip
    patience: int = option(2, "steps without a change that are a fixed point", least=1)
    rollouts: int = option(1, "tries of each puzzle", least=1, most=2**16)
    sigma: float = option(0.0, "noise in each step of a try")
    init: str = option("learned", "where tries start: all at the learned states, or all but the "
                       "first at random ones", choices=INITS)  # fmt: skip
    init_scale: float = option(1.0, "deviation of random starts", metavar="STD")
    select: str | Accepts = option("q", "how the answer is picked among tries: the most confident "
                                   "(q), frequent (vote) or settled (residual), or the first that "
                                   "obeys the rules of the task, and then no more are made (rules)",
                                   choices=(*SELECTIONS, "rules"))  # fmt: skip
    seed: int = option(0, "of all randomness", least=0)
    first_sample: int = 0
    logits: bool = False
    trace: bool = False
    fill: Fill | None = None

    @property
    def needs_loop(self) -> bool:
        """Whether only the loop on the host knows these rules; it measures residuals then."""
        return self.fill is not None or bool({"residual", "entropy"} & {self.halt, self.select})

    @property
    def compares(self) -> bool:
        """Whether a row may end because its answer stays the same."""
        return self.halt in ("fixed-point", "any")

    def ends(self, wants: Tensor, unchanged: Tensor) -> Tensor:
        """Which rows end now.

        Args:
            wants: [N] bool, whether q asks to halt.
            unchanged: [N] int, for how many steps in a row the predicted answer stayed the same.
        """
        if self.halt == "q":
            return wants
        settled = unchanged >= self.patience
        return settled if self.halt == "fixed-point" else settled | wants

    def entries(self, numbers: Tensor) -> Tensor:
        """Where rows of these numbers are in the noise stream."""
        return numbers + self.first_sample * self.rollouts
