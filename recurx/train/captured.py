"""One supervision step as one CUDA graph: sample replacement, forward, loss, backward, optimisers.

Everything that a step reads and writes lies on the device at an address that never changes: carry,
gradients, counts, learning rates, metrics, the queue of samples. So the step is a function without
arguments that can be recorded once and replayed, and nothing in it waits for the device. Where
there are no graphs the same function runs as it is, and gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recurx import backends, small_ops
from recurx.errors import RecurxError, bad_argument
from recurx.models.puzzle_embedding import PuzzleEmbedding
from recurx.train.ema import Average
from recurx.train.nested import mapped, put_, tensors_of
from recurx.train.optim import reads_the_rate
from recurx.train.queue import SampleQueue

Schedule = Callable[[Tensor], Tensor]  # steps done so far (0-d) -> factor of each learning rate


class CudaGraphs:
    """Records CUDA graphs.

    Args:
        warm_steps: real steps before the recording: lazily made workspaces, compiled kernels,
            gradients and optimiser states exist after them.
        generators: CUDA generators that the step draws from, beside the default one.
    """

    def __init__(self, warm_steps: int = 3, generators: Sequence[torch.Generator] = ()) -> None:
        self.warm_steps, self.generators = warm_steps, generators
        self._stream: torch.cuda.Stream | None = None

    def warm(self, run: Callable[[], None]) -> None:
        """Run a step for real before the recording."""
        # Off the default stream, so that what autograd remembers of it is not captured.
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record `run` without effect; the result replays it."""
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        # On the stream of the warm-up; another thread (a data loader) may allocate meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


class CapturedStep:
    """A training step of a loss head without a host in it; call it once a step.

    Args:
        head: module called as `head(return_keys=(), carry=, batch=)`, giving (carry, loss, metrics,
            outputs, all_halted) like the official `ACTLossHead`, or ours; on one device. Its
            metrics are 0-d tensors.
        optimizers: stepped in order. On a GPU they must not read the device: `AdamATan2`,
            `SparseSignSGD`, PyTorch's with capturable=True, or official ones after
            `recurx.train.swap`. Their `lr` becomes a tensor, `schedule` times what it was.
        queue: where halted slots find their next samples. If ranks share its slots, gradients of
            weights and metrics are summed over them (`SparseSignSGD(world_size=)` gathers its own).
        accumulate: parts of the batch that go forward and backward one after the other, for less
            memory. Gradients add up: the step of the whole batch, up to the order of sums.
        clip_grad_norm: gradients of weights are scaled down to this norm where theirs, over all
            parts and ranks, is larger (`torch.nn.utils.clip_grad_norm_`); 0 never.
        average: updated after the optimisers.
        schedule: factor of the learning rates from the number of steps done (a 0-d fp32 tensor on
            the device): pure PyTorch.
        synchronize: called with all gradients after the backward, to do something else with them
            (NCCL's collectives can be captured).
        begin: gives the batch for a step in place of `queue.take`, and puts fresh samples into its
            carry in place of the model (`recurx.train.recipe.Recipe`).
        capture: None captures where the head is on a GPU; False never does; or a
            `CudaGraphs`, or what stands in for it.

    Attributes:
        carry: the carry between steps; its tensors stay where they are.

    Raises:
        InvalidArgument: a capture is wanted and an optimizer cannot be captured; the batch cannot
            be cut into so many parts, or has an embedding that knows of no parts.
    """

    def __init__(
        self, head: nn.Module, optimizers: Sequence[torch.optim.Optimizer], queue: SampleQueue, *,
        accumulate: int = 1, clip_grad_norm: float = 0.0, average: Average | None = None,
        schedule: Schedule | None = None, synchronize: Callable[[list[Tensor]], None] | None = None,
        begin: Callable[[CapturedStep], dict[str, Tensor]] | None = None,
        capture: CudaGraphs | bool | None = None,
    ) -> None:  # fmt: skip
        self.head, self.optimizers, self.queue = head, list(optimizers), queue
        self.average, self.schedule, self.synchronize = average, schedule, synchronize
        self.accumulate, self.clip_grad_norm, self.begin = accumulate, clip_grad_norm, begin
        self._check_parts()
        device = queue.device
        self.capturer = self._capturer(capture)
        self.count = torch.zeros((), dtype=torch.float32, device=device)
        self._rates = [_rate_on_device(g, device) for g in self._groups()]
        queue.refill()
        with torch.device(device):  # official carries are made on the default device
            first = {key: values[queue.own] for key, values in queue.ring.items()}
            self.carry = head.initial_carry(first)
        for tensor in tensors_of(self.carry):
            tensor.zero_()  # official ones are not initialised
        self.carry.halted.fill_(True)
        self.names: tuple[str, ...] = ()
        self.latest = self.totals = torch.zeros(0, device=device)
        # The first step whose loss or gradient was not finite (0: none), the last loss before it.
        self.health = torch.tensor([0.0, math.nan], dtype=torch.float64, device=device)
        self._grads: list[Tensor] | None = None
        self._warmed = 0
        self._replay: Callable[[], None] | None = None
        self._addresses: list[int] = []

    def __call__(self) -> None:
        """One step: uncaptured while warming up (and without a capturer), then as a graph.

        Raises:
            RecurxError: a tensor moved since the capture.
        """
        with torch.cuda.device_of(self.count):  # streams, events and kernels are its device's
            self._run()

    def _run(self) -> None:
        self.queue.refill()
        self.head.train()
        if self.capturer is None:
            self._step()
        elif self._warmed < max(1, self.capturer.warm_steps):
            self.capturer.warm(self._step)
            self._warmed += 1
        else:
            if self._replay is None:
                backends.free()  # of the warm-up: the graph has buffers of its own
                self._replay = self.capturer.capture(self._step)
                self._addresses = [t.data_ptr() for t in self.static_tensors()]
            elif self._addresses != [t.data_ptr() for t in self.static_tensors()]:
                raise RecurxError(
                    "recurx.train.CapturedStep: a weight, gradient, state or buffer moved since "
                    "the capture (load_state_dict of an optimizer, .to(), zero_grad?). Make "
                    "changes in place, or make a new CapturedStep."
                )
            self._replay()
            small_ops.wrote(self.static_tensors())
        self.queue.stepped()

    def diverged(self) -> tuple[int, float] | None:
        """(the first step whose loss or gradients were not finite, the loss before); waits."""
        step, loss = self.health.tolist()
        return (int(step), loss) if step else None

    def record_anew(self) -> None:
        """Call after what Python does in a step has changed, as with the depth of a model."""
        self._replay, self._warmed = None, 0

    @property
    def captured(self) -> bool:
        """Whether steps are replayed now."""
        return self._replay is not None

    def metrics(self) -> dict[str, float]:
        """The head's metrics of the last step and its "loss" (a sum over slots); waits for it."""
        return dict(zip(self.names, self.latest.tolist(), strict=True))

    def read_totals(self) -> dict[str, float]:
        """Sums of the metrics over the steps since the last call; waits for the device."""
        totals = dict(zip(self.names, self.totals.tolist(), strict=True))
        self.totals.zero_()
        return totals

    def static_tensors(self) -> list[Tensor]:
        """Every tensor that outlives a step."""
        found = [self.count, self.latest, self.totals, self.health, self.queue.cursor]
        found += [*self.queue.ring.values(), *tensors_of(self.carry), *self._rates]
        found += [*self.head.parameters(), *self.head.buffers(), *(self._grads or ())]
        for optimizer in self.optimizers:
            found += [t for state in optimizer.state.values() for t in tensors_of(dict(state))]
        if self.average is not None:
            found += [self.average.count, *self.average.weights.values()]
        return found

    # ---- the step: from here on no host ----------------------------------------------------------

    def _step(self) -> None:
        if self._grads is not None:
            torch._foreach_zero_(self._grads)
        self._set_rates()
        batch = self.begin(self) if self.begin else self.queue.take(self.carry.halted)
        metrics: dict[str, Tensor] = {}
        for part in self._parts():
            before, fresh = self.carry, batch
            if self.accumulate > 1:
                before, fresh = (mapped(lambda t: t[part], every) for every in (before, fresh))  # noqa: B023
            carry, loss, told, _, _ = self.head(return_keys=(), carry=before, batch=fresh)
            (loss / self.queue.slots).backward()
            for name, value in (told | {"loss": loss.detach()}).items():
                metrics[name] = metrics[name] + value if name in metrics else value
            with torch.no_grad():
                put_(before, carry)
        if self._grads is None:  # weights that the loss does not reach have none, and stay
            self._grads = [t.grad for t in self._leaves() if t.grad is not None]
        with torch.no_grad():
            weights = [p for p in self.head.parameters() if p.grad is not None]
            self.queue.ranks.sum_([p.grad for p in weights])
            if self.synchronize is not None:
                self.synchronize(self._grads)
            self._keep(metrics)
            self._look_after(weights)
            for optimizer in self.optimizers:
                optimizer.step()
            if self.average is not None:
                self.average.update(self.head)
            self.count.add_(1)

    def _parts(self) -> Iterator[slice]:
        """The slots of each part; whoever numbers slots by itself is told where the part begins."""
        slots = self.queue.own.stop - self.queue.own.start
        if self.accumulate == 1:
            yield slice(0, slots)
            return
        size = slots // self.accumulate
        models = [m for m in self.head.modules() if getattr(m, "exploration", None) is not None]
        tables = [m for m in self.head.modules() if isinstance(m, PuzzleEmbedding)]
        noisy = [m for m in self.head.modules() if hasattr(m, "noise_seed")]
        for first in range(0, slots, size):
            for model in models:
                model.exploration.first_slot = self.queue.own.start + first
                if first:  # all parts are of one draw
                    model.exploration.state[1:].sub_(1)
            for inner in noisy:
                inner.first_sample = self.queue.own.start + first
                inner.noise_seed.sub_(int(first > 0))
            for table in tables:
                table.first_row = first
            yield slice(first, first + size)

    def _look_after(self, weights: list[nn.Parameter]) -> None:
        """Clip the gradients; note where they, or the loss, are not finite."""
        grads = [p.grad for p in weights]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(weights, self.clip_grad_norm, norm)
        norm = getattr(norm, "full_tensor", lambda: norm)()  # where weights are sharded (FSDP2)
        loss = self.latest[self.names.index("loss")] / self.queue.slots
        fine = torch.isfinite(loss) & torch.isfinite(norm)
        own = {id(grad) for grad in grads}
        if sparse := [grad for grad in self._grads or () if id(grad) not in own]:
            fine = fine & torch.isfinite(torch.nn.utils.get_total_norm(sparse))
        first, last = self.health[0], self.health[1]
        last.copy_(torch.where(fine & (first == 0), loss, last))
        first.copy_(torch.where(fine | (first != 0), first, self.count + 1))

    @torch.no_grad()
    def _set_rates(self) -> None:
        for group, base in zip(self._groups(), self._rates, strict=True):
            group["lr"].copy_(base if self.schedule is None else base * self.schedule(self.count))

    def _keep(self, metrics: Mapping[str, Tensor]) -> None:
        if not self.names:
            self.names = tuple(metrics)
            self.latest = torch.zeros(len(metrics), device=self.queue.device)
            self.totals = torch.zeros_like(self.latest, dtype=torch.float64)
        values = [metrics[name].to(torch.float32) for name in self.names]
        torch.stack(values, out=self.latest)
        self.queue.ranks.sum_([self.latest])
        self.totals.add_(self.latest)

    def _groups(self) -> Iterator[dict[str, Any]]:
        return (group for optimizer in self.optimizers for group in optimizer.param_groups)

    def _check_parts(self) -> None:
        slots, parts = self.queue.own.stop - self.queue.own.start, self.accumulate
        expected = f"a divisor of the {slots} slots of a rank"
        fits = parts >= 1 and slots % parts == 0
        for module in self.head.modules() if fits and parts > 1 else ():
            if hasattr(module, "local_ids") and not isinstance(module, PuzzleEmbedding):
                fits, expected = False, f"1 with {type(module).__name__}, which knows of no parts"
        if not fits:
            raise bad_argument("train.CapturedStep", "accumulate", expected, parts)

    def _leaves(self) -> list[Tensor]:
        """What gets gradients: weights, and the rows of a sparse embedding (a buffer)."""
        leaves = [*self.head.parameters(), *self.head.buffers()]
        leaves += [p for group in self._groups() for p in group["params"]]
        unique = {id(t): t for t in leaves if t.requires_grad and t.is_leaf}
        return list(unique.values())

    def _capturer(self, capture: CudaGraphs | bool | None) -> CudaGraphs | None:
        device = self.queue.device.type
        if capture is False or (capture is None and device != "cuda"):
            return None
        if capture is True and device != "cuda":
            raise bad_argument(
                "train.CapturedStep", "capture", "a queue and a head on a CUDA device", device,
                "Leave capture out: the same step then runs uncaptured here.",
            )  # fmt: skip
        for optimizer in self.optimizers:
            got, hint = type(optimizer).__name__, ""
            if any(group.get("capturable") is False for group in optimizer.param_groups):
                got, hint = f"{got} with capturable=False", "Build it with capturable=True."
            elif reads_the_rate(optimizer):
                hint = "Use recurx.train.Muon, or recurx.train.swap it."
            if hint:
                never = "ones that never read the device"
                raise bad_argument("train.CapturedStep", "optimizers", never, got, hint)
        return CudaGraphs() if capture is None or capture is True else capture


def _rate_on_device(group: dict[str, Any], device: torch.device) -> Tensor:
    """The base learning rate of a group; its `lr` becomes a tensor that the step writes."""
    base = torch.as_tensor(group["lr"], dtype=torch.float32).to(device, copy=True)
    group["lr"] = base.clone()
    return base
