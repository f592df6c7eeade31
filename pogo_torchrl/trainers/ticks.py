"""Ticks of updates, which take the place of collected batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tensordict import TensorDict

# Maximum number of updates per tick. A tick is what the trainer runs before it looks at hooks,
# signals and the progress bar again; it takes the role of TorchRL's batch.
_MAX_STEP_LENGTH = 25


class OfflineStepIterator:
    """Replaces the data collector of an online trainer and yields ticks of updates.

    Each tick is a tensordict without entries. Its batch size is the number of updates, at most 25,
    until the next multiple of any of ``intervals``, the next of ``stops`` or the end, so that hooks
    run at exactly their intervals.

    Args:
        total: total number of updates.
        intervals: intervals in updates. Defaults to none.
        stops: single updates after which a tick also ends. Defaults to none.

    Example:
        >>> ticks = OfflineStepIterator(total=25, intervals=[10])
        >>> [tick.numel() for tick in ticks]
        [10, 10, 5]
    """

    init_random_frames = 0

    def __init__(
        self, total: int, intervals: Sequence[int] = (), stops: Sequence[int] = ()
    ) -> None:
        self.total = total
        self.intervals = [total, *intervals]
        self.stops = list(stops)
        self.step = 0

    def __iter__(self) -> Iterator[TensorDict]:
        while self.step < self.total:
            ahead = [interval - self.step % interval for interval in self.intervals]
            ahead += [stop - self.step for stop in self.stops if stop > self.step]
            length = min(*ahead, self.total - self.step, _MAX_STEP_LENGTH)
            self.step += length
            yield TensorDict({}, [length])

    def at_boundary(self, step: int) -> bool:
        """Whether a tick ends after update ``step`` for another reason than its length."""
        return step in self.stops or any(step % interval == 0 for interval in self.intervals)

    def stop(self) -> None:
        """Stop iterating after the current tick."""
        self.total = self.step

    def state_dict(self) -> dict[str, Any]:
        """Return the current step."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the step returned by :meth:`state_dict`."""
        self.step = state_dict["step"]

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Return ``seed``: nothing is collected, so nothing is seeded."""
        return seed

    def update_policy_weights_(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: no policy collects data."""

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: there is nothing to shut down."""
