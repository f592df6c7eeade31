"""CUDA graphs of whole updates: one launch runs many updates without Python in between."""

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
    """Device operations that are captured once and replayed without running Python."""

    def capture(self, work: Callable[[], None]) -> None:
        """Capture the device operations of ``work``.

        Args:
            work: function that launches the operations. It may be called several times to warm up.
        """

    def replay(self) -> None:
        """Run the captured operations again, on the same memory."""


class Stepper(Protocol):
    """Interface of :class:`~pogo_torchrl.trainers.POGOOptimizationStepper` that graphs use."""

    loss_module: Any
    policy_freq: int
    steps: int
    last_batch: TensorDictBase | None

    @property
    def with_actors(self) -> bool:
        """Whether the next update also updates actors."""

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the networks that the next update trains."""

    def update_on(self, batch: TensorDictBase, lr: Tensor) -> Any:
        """Run one update on the device, without counting it."""

    def advance(self, count: int) -> None:
        """Count completed updates and step the learning-rate schedulers."""

    def lr(self) -> Tensor:
        """Return the learning rates of the next update."""

    def preserve_state(self) -> AbstractContextManager[None]:
        """Context manager that restores all training state in place on exit."""


class CUDAGraph:
    """A :class:`DeviceGraph` on a GPU.

    Random numbers come from torch's default generator, whose state each replay reads and advances.
    They equal those that the same work draws without a graph.

    Args:
        device: the GPU.
    """

    warmup = 3  # warm-up passes, in which torch compiles and its libraries initialise

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], None]) -> None:
        """Warm up and capture on a side stream, as recommended by torch's notes on CUDA graphs.

        Args:
            work: function that launches the operations, called ``warmup + 1`` times.
        """
        with torch.cuda.device(self.device):
            stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                for _ in range(self.warmup):
                    work()
            stream.wait_stream(side)
            generator_state = generator.clone_state()
            try:
                # The outer context restores the current stream, which a failed capture does not.
                # "thread_local" lets other threads (loggers, pinning of memory) use the GPU freely.
                with (
                    torch.cuda.stream(stream),
                    torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"),
                ):
                    work()
            except Exception:
                # A failed capture leaves the generator in capture mode, in which it cannot draw.
                generator.graphsafe_set_state(generator_state)
                raise

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self.graph.replay()


class UpdateGraphs:
    """Runs updates by replaying CUDA graphs.

    One graph holds ``longest`` updates, another one a single update for the remainder (a third one
    holds an update without the actors, if ``policy_freq`` is greater than 1; if the critics are
    frozen during training, there are other graphs before and after). Each update consists
    of sampling, noise, the update itself and the sums for logging. If the sampling of a replay
    buffer cannot be captured, batches are sampled outside of the graph and copied to memory from
    which a graph of a single update reads. Learning rates are also written to memory that the
    graphs read.

    Capturing does not affect the run: weights, moments, sums, counters and random states are
    restored afterwards. Graphs are not part of checkpoints. They read and write the memory in which
    the training state is stored, and are captured again if that memory has changed. A resumed run
    draws the same random numbers as an uninterrupted run; it is bitwise identical if the kernels of
    the GPU are deterministic (``deterministic=true``).

    If a capture fails, a warning is logged once and training continues without graphs.

    Args:
        stepper: stepper whose updates are run.
        make: function that creates an empty graph.
        longest: maximum number of updates in a graph, rounded down to whole cycles of
            ``policy_freq`` (at least one). Defaults to ``25``.
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
        # Each graph with its last batch, kept alive because the graph writes to its memory.
        self._graphs: dict[tuple[int, tuple[str, ...]], tuple[DeviceGraph, TensorDictBase]] = {}

    def run(self, count: int, batches: Any) -> None:
        """Run ``count`` updates.

        Args:
            count: number of updates.
            batches: source of the batches, usually a replay buffer.
        """
        stepper = self.stepper
        samples_on = getattr(batches, "samples_on", lambda device: False)
        samples = samples_on(stepper.loss_module.min_action.device)
        if samples and not self._graphs:
            stepper.loss_module.check_batch(batches[:1])
        while count:
            use_longest = samples and stepper.with_actors and count >= self.longest
            length = self.longest if use_longest and not self.failed else 1
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
                self._write_learning_rates(length)
                graph, stepper.last_batch = found
                graph.replay()
            count -= length

    def _write_learning_rates(self, length: int) -> None:
        """Advance by ``length`` updates and write their learning rates to the graphs' memory."""
        assert self._rates is not None
        for index in range(length):
            rates = self.stepper.lr()
            if self._written[index] is not rates:
                self._rates[index].copy_(rates)
                self._written[index] = rates
            self.stepper.advance(1)

    def _copy_to_inputs(self, batch: TensorDictBase) -> bool:
        """Copy a batch to the graphs' memory; ``False`` if its layout differs from earlier ones."""
        if self._inputs is None:
            self.stepper.loss_module.check_batch(batch)
            self._inputs = batch.clone()
        elif _layout(batch) != _layout(self._inputs):
            return False
        self._inputs.update_(batch)
        return True

    def _graph(self, length: int, batches: Any) -> tuple[DeviceGraph, TensorDictBase] | None:
        """Return the graph of the next ``length`` updates and its last batch, or ``None``."""
        stepper = self.stepper
        key, first = (length, stepper.trained), stepper.steps
        if self.failed or key in self._graphs:
            return self._graphs.get(key)
        if self._rates is None:
            rates = stepper.lr()
            self._rates = rates.expand(self.longest, -1).clone()
            self._written: list[Tensor] = [rates] * self.longest
        memory = self._rates
        last: list[TensorDictBase] = []

        def work() -> None:
            for index in range(length):
                stepper.steps = first + index  # every pass captures the same updates
                batch = batches.sample() if self._inputs is None else self._inputs
                stepper.update_on(batch, memory[index])
                last[:] = [batch]

        try:
            graph = self.make()
            with stepper.preserve_state():
                graph.capture(work)
            self._graphs[key] = graph, last[0]
        except Exception as error:  # any failure: updates can run without graphs
            self.failed = True
            self._graphs.clear()
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _LOGGER.warning("CUDA graph capture failed, updates run slower without it: %s", reason)
        return self._graphs.get(key)


def _layout(batch: TensorDictBase) -> dict:
    return {key: (x.shape, x.dtype, x.device) for key, x in batch.items(True, True)}
