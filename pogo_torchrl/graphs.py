"""CUDA graphs of whole updates: one launch makes many, and Python takes no time in between."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from tensordict import TensorDictBase
from torchrl.checkpoint import GlobalRNGState

if TYPE_CHECKING:
    from pogo_torchrl.training import POGOTrainer

_LOGGER = logging.getLogger(__name__)


class DeviceGraph(Protocol):
    """Work of a device, captured once and replayed without the Python that issued it."""

    def capture(self, work: Callable[[], None]) -> None:
        """Keep what ``work`` has the device do. It may be run several times, to warm up."""

    def replay(self) -> None:
        """Have the device do it again, on the same memory."""


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
    """Makes a trainer's updates by replaying captured ones.

    One graph holds ``longest`` updates, one a single update for what is left over (one more where
    ``policy_freq`` leaves the actors out of some): sampling, noise, the update, and the sums of
    the log. A replay buffer whose sampling no graph can hold samples as ever, batch by batch,
    into memory that a graph of a single update reads.

    Capturing leaves no trace in the run: weights, moments, sums, counters and random states are
    what they were before. Graphs are part of no checkpoint: they read and write the memory that a
    checkpoint is loaded into, and a resumed run captures its own. It draws what the unbroken run
    draws; to the last bit it equals that as far as the GPU's kernels repeat themselves
    (``deterministic=true``).

    A capture that fails gives one warning, and training goes on without graphs.

    Args:
        trainer: whose updates; it has only hooks of our own at each of them.
        make: makes the graphs.
        longest: updates in the longest graph, in whole cycles of ``policy_freq``.
    """

    def __init__(
        self, trainer: POGOTrainer, make: Callable[[], DeviceGraph], longest: int = 25
    ) -> None:
        cycle = trainer.optimization_stepper.policy_freq
        self.trainer, self.make = trainer, make
        self.longest = cycle * max(1, longest // cycle)
        samples_on = getattr(trainer._dataset, "samples_on", lambda device: False)
        self.samples = samples_on(trainer.loss_module.min_action.device)
        self.failed = False
        self._inputs: TensorDictBase | None = None
        # Each with its last batch: memory that it writes, which nobody else shall be given.
        self._graphs: dict[tuple[int, bool], tuple[DeviceGraph, TensorDictBase]] = {}

    def run(self, count: int) -> None:
        """Make so many updates."""
        trainer, stepper = self.trainer, self.trainer.optimization_stepper
        while count:
            whole = self.samples and stepper.with_actors and count >= self.longest
            length = self.longest if whole and not self.failed else 1
            batch = None if self.samples else trainer.sample()
            found = self._graph(length) if batch is None or self._take_in(batch) else None
            if found is None:
                trainer.update_on(trainer.sample() if batch is None else batch)
                length = 1
            else:
                graph, last = found
                graph.replay()
                # What Python does in an update beside having the device work.
                stepper.steps += length
                trainer._optim_count += length
                for metrics in trainer.metrics:
                    metrics.remember(last)
            count -= length

    def _take_in(self, batch: TensorDictBase) -> bool:
        """Copy a batch to where graphs read it, if it is like those before it."""
        if self._inputs is None:
            self._inputs = batch.clone()
        elif _layout(batch) != _layout(self._inputs):
            return False
        self._inputs.update_(batch)
        return True

    def _graph(self, length: int) -> tuple[DeviceGraph, TensorDictBase] | None:
        """The graph of the next ``length`` updates and its last batch; ``None``: there is none."""
        trainer, stepper = self.trainer, self.trainer.optimization_stepper
        key, first = (length, stepper.with_actors), stepper.steps
        if self.failed or key in self._graphs:
            return self._graphs.get(key)
        last: list[TensorDictBase] = []

        def work() -> None:
            stepper.steps = first  # every pass is one of the same updates
            for _ in range(length):
                last[:] = [trainer.sample() if self._inputs is None else self._inputs]
                trainer.update_on(*last)

        try:
            graph = self.make()
            with self._undone():
                graph.capture(work)
            self._graphs[key] = graph, last[0]
        except Exception as error:  # whatever it is, the updates can be made without
            self.failed = True
            self._graphs.clear()
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _LOGGER.warning("No CUDA graphs, the updates are slower for it: %s", reason)
        return self._graphs.get(key)

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Put everything back that updates change, in place: as a resumed run finds it."""
        trainer = self.trainer
        parts = [trainer.loss_module, trainer.optimization_stepper, *trainer.metrics]
        parts.append(GlobalRNGState())
        states, count = [copy.deepcopy(part.state_dict()) for part in parts], trainer._optim_count
        try:
            yield
        finally:
            trainer._optim_count = count
            for part, state in zip(parts, states):
                part.load_state_dict(state)


def _layout(batch: TensorDictBase) -> dict:
    return {key: (x.shape, x.dtype, x.device) for key, x in batch.items(True, True)}
