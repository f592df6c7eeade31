"""Several runs in one process, as one batched computation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any

from omegaconf import DictConfig
from torchrl.checkpoint import GlobalRNGState

from pogo_torchrl.experiments.build import choose_compile, deterministic
from pogo_torchrl.experiments.console import ConsoleHandler, log_to
from pogo_torchrl.experiments.run import RunInProgress
from pogo_torchrl.experiments.run_folder import lock_run_folder
from pogo_torchrl.experiments.signals import stop_on_signals
from pogo_torchrl.screen import expendable_screen
from pogo_torchrl.trainers import TrainerStack


def run_stack(cfgs: Sequence[DictConfig]) -> list[Exception | None]:
    """Train and evaluate several runs in one process, as one batched computation.

    Each run writes the same files as a single run would. A failure ends only the run it occurs in.

    Args:
        cfgs: one :class:`~pogo_torchrl.experiments.config.RunConfig` per run. All have the same
            task and differ only in ``seed``, ``w2_weights`` (of equal length) and ``alpha``.

    Returns:
        For each run the exception that ended it, or ``None`` if the run is complete.
    """
    errors: list[Exception | None] = [None] * len(cfgs)
    runs: dict[int, RunInProgress] = {}
    streams = [_RandomStream() for _ in cfgs]

    @contextmanager
    def guarded(index: int) -> Iterator[None]:
        try:
            with streams[index]:
                yield
        except Exception as error:
            errors[index] = error
            runs.pop(index, None)

    with (
        expendable_screen(),
        ExitStack() as locks,
        log_to(ConsoleHandler()),
        deterministic(cfgs[0].deterministic),
    ):
        replay_buffer = None
        for index, cfg in enumerate(cfgs):
            with guarded(index):
                one = RunInProgress(cfg, stacked=True)
                locks.enter_context(one.environments())
                locks.enter_context(lock_run_folder(one.folder))
                locks.enter_context(closing(one))
                one.read_data(replay_buffer)
                replay_buffer = one.replay_buffer
                with one.opened():
                    runs[index] = one
        # Runs in a stack must be at the same update: group resumed runs by theirs.
        stacks: dict[int, list[int]] = {}
        for index, one in runs.items():
            stacks.setdefault(one.trainer.collected_frames, []).append(index)
        with stop_on_signals(list(runs.values())):
            for members in stacks.values():
                results = _train_stack([runs[i] for i in members], [streams[i] for i in members])
                for index, error in zip(members, results):
                    errors[index] = error
        for index, one in list(runs.items()):
            if errors[index] is None:
                with guarded(index), one.logged():
                    one.finish()
    return errors


def _train_stack(
    runs: Sequence[RunInProgress], streams: Sequence[_RandomStream]
) -> list[Exception | None]:
    cfg = runs[0].cfg

    @contextmanager
    def around_hooks(index: int) -> Iterator[None]:
        with streams[index], runs[index].logged():
            yield

    stack = TrainerStack(
        [one.trainer for one in runs],
        streams.__getitem__,
        around_hooks=around_hooks,
        compile=choose_compile(cfg.compile, cfg.total_steps, cfg.w2_backend),
    )
    return stack.train()


class _RandomStream(AbstractContextManager):
    """Context manager that swaps in the global random state of one run."""

    def __init__(self) -> None:
        self._state = GlobalRNGState()
        self._inside: dict[str, Any] | None = None

    def __enter__(self) -> None:
        self._outside = self._state.state_dict()
        if self._inside is not None:
            self._state.load_state_dict(self._inside)

    def __exit__(self, *_: object) -> None:
        self._inside = self._state.state_dict()
        self._state.load_state_dict(self._outside)
