"""CUDA graphs of whole updates: one launch makes many, and Python takes no time in between."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor

_LOGGER = logging.getLogger(__name__)


class DeviceGraph(Protocol):
    """Work of a device, captured once and replayed without the Python that issued it."""

    def capture(self, work: Callable[[], None]) -> None:
        """Keep what ``work`` has the device do. It may be run several times, to warm up."""

    def replay(self) -> None:
        """Have the device do it again, on the same memory."""


class Stepper(Protocol):
    """What makes updates: :class:`~pogo_torchrl.trainers.POGOOptimizationStepper`."""

    loss_module: Any
    policy_freq: int
    steps: int
    last_batch: TensorDictBase | None

    @property
    def with_actors(self) -> bool:
        """Whether the next update is one of the actors, too."""

    def update_on(self, batch: TensorDictBase, lr: Tensor) -> Any:
        """The work of one update on the device."""

    def advance(self, count: int) -> None:
        """Count updates and move the learning rates on."""

    def lr(self) -> Tensor:
        """The learning rates of the next update."""

    def preserve_state(self) -> AbstractContextManager[None]:
        """Restore all training state at the end, in place."""


class CUDAGraph:
    """A :class:`DeviceGraph` of a GPU.

    Draws are of torch's default generator, whose state is read and moved on by each replay: they
    are those that the same work gives without a graph.

    Args:
        device: the GPU.
    """

    warmup = 3  # passes in which torch compiles, and its libraries set themselves up

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], None]) -> None:
        """As torch's notes on CUDA graphs have it: warm up and capture on a side stream."""
        with torch.cuda.device(self.device):
            stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                for _ in range(self.warmup):
                    work()
            stream.wait_stream(side)
            unharmed = generator.clone_state()
            try:
                # The outer context returns to this stream, which a failed capture does not. Other
                # threads (loggers, a loader that pins memory) may do with the GPU what they like.
                with (
                    torch.cuda.stream(stream),
                    torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"),
                ):
                    work()
            except Exception:
                # It leaves the generator in the middle of a capture, where it draws no more.
                generator.graphsafe_set_state(unharmed)
                raise

    def replay(self) -> None:
        """Launch it on the current stream."""
        self.graph.replay()


class UpdateGraphs:
    """Makes updates by replaying captured ones.

    One graph holds ``longest`` updates, one a single update for what is left over (one more where
    ``policy_freq`` leaves the actors out of some): sampling, noise, the update, and the sums of
    the log. A replay buffer whose sampling no graph can hold samples as ever, batch by batch,
    into memory that a graph of a single update reads. Learning rates are written to memory that
    the graphs read.

    Capturing leaves no trace in the run: weights, moments, sums, counters and random states are
    what they were before. Graphs are part of no checkpoint: they read and write the memory where
    the state lies, and are captured again where that has moved. A resumed run draws what the
    unbroken run draws; to the last bit it equals that as far as the GPU's kernels repeat
    themselves (``deterministic=true``).

    A capture that fails gives one warning, and training goes on without graphs.

    Args:
        stepper: whose updates.
        make: makes the graphs.
        longest: updates in the longest graph, in whole cycles of ``policy_freq``.
    """

    def __init__(
        self, stepper: Stepper, make: Callable[[], DeviceGraph], longest: int = 25
    ) -> None:
        cycle = stepper.policy_freq
        self.stepper, self.make = stepper, make
        self.longest = cycle * max(1, longest // cycle)
        self.failed = False
        self._inputs: TensorDictBase | None = None
        self._rates: Tensor | None = None
        # Each with its last batch: memory that it writes, which nobody else shall be given.
        self._graphs: dict[tuple[int, bool], tuple[DeviceGraph, TensorDictBase]] = {}

    def run(self, count: int, batches: Any) -> None:
        """Make ``count`` updates on batches of a replay buffer."""
        stepper = self.stepper
        samples_on = getattr(batches, "samples_on", lambda device: False)
        samples = samples_on(stepper.loss_module.min_action.device)
        if samples and not self._graphs:
            stepper.loss_module.check_batch(batches[:1])
        while count:
            whole = samples and stepper.with_actors and count >= self.longest
            length = self.longest if whole and not self.failed else 1
            batch = None if samples else batches.sample()
            found = (
                self._graph(length, batches)
                if batch is None or self._copy_to_inputs(batch)
                else None
            )
            if found is None:
                stepper.update_on(batches.sample() if batch is None else batch, stepper.lr())
                stepper.advance(1)
                length = 1
            else:
                self._write_rates(length)
                graph, stepper.last_batch = found
                graph.replay()
            count -= length

    def _write_rates(self, length: int) -> None:
        """Advance by ``length`` updates, writing the learning rate of each to where graphs read."""
        assert self._rates is not None
        for place in range(length):
            rates = self.stepper.lr()
            if self._written[place] is not rates:
                self._rates[place].copy_(rates)
                self._written[place] = rates
            self.stepper.advance(1)

    def _copy_to_inputs(self, batch: TensorDictBase) -> bool:
        """Copy a batch to where graphs read it, if it is like those before it."""
        if self._inputs is None:
            self.stepper.loss_module.check_batch(batch)
            self._inputs = batch.clone()
        elif _layout(batch) != _layout(self._inputs):
            return False
        self._inputs.update_(batch)
        return True

    def _graph(self, length: int, batches: Any) -> tuple[DeviceGraph, TensorDictBase] | None:
        """The graph of the next ``length`` updates and its last batch; ``None``: there is none."""
        stepper = self.stepper
        key, first = (length, stepper.with_actors), stepper.steps
        if self.failed or key in self._graphs:
            return self._graphs.get(key)
        if self._rates is None:
            rates = stepper.lr()
            self._rates = rates.expand(self.longest, -1).clone()
            self._written: list[Tensor] = [rates] * self.longest
        memory = self._rates
        last: list[TensorDictBase] = []

        def work() -> None:
            for place in range(length):
                stepper.steps = first + place  # every pass is one of the same updates
                batch = batches.sample() if self._inputs is None else self._inputs
                stepper.update_on(batch, memory[place])
                last[:] = [batch]

        try:
            graph = self.make()
            with stepper.preserve_state():
                graph.capture(work)
            self._graphs[key] = graph, last[0]
        except Exception as error:  # whatever it is, the updates can be made without
            self.failed = True
            self._graphs.clear()
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _LOGGER.warning("No CUDA graphs, the updates are slower for it: %s", reason)
        return self._graphs.get(key)


def _layout(batch: TensorDictBase) -> dict:
    return {key: (x.shape, x.dtype, x.device) for key, x in batch.items(True, True)}
