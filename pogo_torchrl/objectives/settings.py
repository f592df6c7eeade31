"""Settings of losses: their checks, in the constructor and whenever they are set later."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from pogo_torchrl.functional import Q_NORMALIZATIONS
from pogo_torchrl.ot import BACKENDS, MAX_POINTS


def plain_number(value: Any) -> Any:
    """Return a NumPy scalar or a tensor with no dimensions as a number of Python.

    All other values are returned as they are.
    """
    scalar = isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0
    return value.item() if scalar else value


Check = Callable[[str, Any], None]
"""Raises a ``ValueError`` that names a setting if its value is out of range."""


def check_weights(w2_weights: Sequence[float]) -> tuple[float, ...]:
    """Return the weights of a chain as a tuple of floats.

    Raises:
        ValueError: if they are not a non-empty sequence of finite numbers >= 0.
    """
    try:
        weights = () if isinstance(w2_weights, str) else tuple(float(w) for w in w2_weights)
    except (TypeError, ValueError):
        weights = ()
    if not weights or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ValueError(
            f"w2_weights={w2_weights!r} must be a sequence of finite numbers >= 0, one per actor "
            "of the chain, e.g. (0.2, 0.2, 0.2)."
        )
    return weights


def check_step_sizes(step_sizes: Sequence[float] | float, num_actors: int) -> tuple[float, ...]:
    """Return the step sizes of a chain as a tuple of floats.

    Args:
        step_sizes: one per actor, or a single number for all ``num_actors``.
        num_actors: number of actors, for a single number.

    Raises:
        ValueError: if they are not positive finite numbers.
    """
    try:
        step_sizes = plain_number(step_sizes)
        if isinstance(step_sizes, int | float):
            sizes: tuple[float, ...] = (float(step_sizes),) * num_actors
        else:
            sizes = () if isinstance(step_sizes, str) else tuple(float(h) for h in step_sizes)
    except (TypeError, ValueError):
        sizes = ()
    if not sizes or not all(0 < h < math.inf for h in sizes):
        raise ValueError(
            f"step_sizes={step_sizes!r} must be a positive number, or a sequence of positive "
            "numbers, one per actor of the chain, e.g. (0.5, 0.5, 0.5)."
        )
    return sizes


def chain_weights(
    w2_weights: Sequence[float] | None,
    step_sizes: Sequence[float] | None,
    low: Tensor,
    alpha: float,
) -> tuple[float, ...]:
    """Return the weights of the actors that a chain adds to a base.

    Args:
        w2_weights: the weights, or ``None``. They may be empty: the base alone.
        step_sizes: the sizes of their steps, or ``None``.
        low: lower action bound, which gives the number of action dimensions.
        alpha: weight of the Q term.

    Raises:
        ValueError: if not exactly one of both is given, or if it is invalid.
    """
    if w2_weights is not None and step_sizes is None:
        return check_weights(w2_weights) if len(w2_weights) else ()
    if step_sizes is None or w2_weights is not None:
        raise ValueError("JKOChain needs either w2_weights or step_sizes, one per added actor.")
    if not low.dim():
        raise ValueError(
            "step_sizes depend on the number of action dimensions, which bounds=(low, high) of "
            "two numbers do not tell: pass action_spec=Bounded(...)."
        )
    return tuple(alpha / (h * low.shape[-1]) for h in check_step_sizes(step_sizes, 1))


def check_integer(name: str, value: int) -> None:
    """Check that a setting is an integer >= 1, raising ``ValueError`` otherwise."""
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer >= 1.")


def check_positive(name: str, value: float, or_zero: bool = False) -> None:
    """Check that a setting is finite and > 0 (or >= 0), raising ``ValueError`` otherwise."""
    value = plain_number(value)
    ok = isinstance(value, (int, float)) and math.isfinite(value)
    if not ok or value < 0 or (value == 0 and not or_zero):
        raise ValueError(
            f"{name}={value!r} must be a finite number {'>= 0' if or_zero else '> 0'}."
        )


def check_share(name: str, value: float, or_zero: bool = False) -> None:
    """Check that a setting is in (0, 1] (or [0, 1]), raising ``ValueError`` otherwise."""
    value = plain_number(value)
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    if not ok or (value == 0 and not or_zero):
        interval = "[0, 1]" if or_zero else "(0, 1]"
        raise ValueError(f"{name}={value!r} must be a number in {interval}, e.g. 0.25.")


def check_gamma(gamma: float | Tensor) -> None:
    """Check that the discount factor is in [0, 1], raising ``ValueError`` otherwise."""
    try:
        fits = 0 <= float(gamma) <= 1
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise ValueError(f"gamma={gamma} must be a number in [0, 1], e.g. 0.99.")


def check_choice(name: str, value, allowed: tuple) -> None:
    """Check that a setting is one of the allowed values, raising ``ValueError`` otherwise."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {list(allowed)}.")


def _if_given(check: Check) -> Check:
    """The same check for a setting that may be ``None``."""
    return lambda name, value: None if value is None else check(name, value)


COMMON_CHECKS: dict[str, Check] = {
    "num_qvalue_nets": check_integer,
    "alpha": check_positive,
    "policy_noise": partial(check_positive, or_zero=True),
    "noise_clip": partial(check_positive, or_zero=True),
    "critic_bc_weight": partial(check_positive, or_zero=True),
    "q_normalization": partial(check_choice, allowed=Q_NORMALIZATIONS),
    "loss_function": partial(check_choice, allowed=("l2", "l1", "smooth_l1")),
    "reduction": partial(check_choice, allowed=("mean", "sum", "none")),
}
"""Checks of the settings that several losses share, by name."""

CHAIN_CHECKS: dict[str, Check] = COMMON_CHECKS | {
    "num_samples": check_integer,
    "blur": check_positive,
    "w2_fraction": check_share,
    "data_weight": partial(check_share, or_zero=True),
    "w2_backend": partial(check_choice, allowed=BACKENDS),
    "target_action": partial(check_choice, allowed=("noisy", "min_clean_noisy")),
    "actor_q": partial(check_choice, allowed=("first", "mean")),
    "chain_init": partial(check_choice, allowed=("independent", "copy")),
    "average_actors": _if_given(check_share),
    "advantage_temperature": _if_given(check_positive),
}
"""Checks of the settings of :class:`~pogo_torchrl.POGOLoss`, by name."""


class CheckedSettings:
    """Mixin of loss modules whose settings are checked whenever they are set.

    That is in the constructor, and whenever a user sets them later, for example to schedule them.
    Scalars of NumPy and tensors without dimensions become numbers of Python. Settings from which
    networks were created cannot be set later.

    Attributes:
        checks: checks of the settings by name.
        fixed: names of the settings from which networks are created.
    """

    checks: ClassVar[dict[str, Check]] = COMMON_CHECKS
    fixed: ClassVar[tuple[str, ...]] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, which may be a setting.

        Raises:
            ValueError: if it is out of range, or cannot be changed any more.
        """
        if name in self.checks:
            value = plain_number(value)
            self.checks[name](name, value)
        if self.is_created:
            if name in self.fixed and value != getattr(self, name):
                raise ValueError(self.too_late(name, value))
            value = self.checked_change(name, value)
        super().__setattr__(name, value)

    def too_late(self, name: str, value: Any) -> str:
        """Message for a setting that cannot be changed any more."""
        return (
            f"{name}={value!r} comes too late, since the networks of this {type(self).__name__} "
            "exist already: create another loss with it."
        )

    @property
    def is_created(self) -> bool:
        """Whether the constructor has registered the networks."""
        return "qvalue_network_params" in self.__dict__.get("_modules", ())

    def checked_change(self, name: str, value: Any) -> Any:
        """Return the new value of an attribute after creation, checked with the other settings."""
        return value


def check_exact(w2_backend: str, num_samples: int) -> None:
    """Check that the exact divergence supports a number of samples, or raise ``ValueError``."""
    if w2_backend == "exact" and num_samples > MAX_POINTS:
        raise ValueError(
            f"num_samples={num_samples} is too large for w2_backend='exact', which supports "
            f"at most {MAX_POINTS}: lower it, or use w2_backend='fast'."
        )


def check_trajectory_weights(trajectory_weights: bool, data_weight: float) -> None:
    """Check that there is a data term to be weighted, raising ``ValueError`` otherwise."""
    if trajectory_weights and not data_weight:
        raise ValueError(
            "trajectory_weights=True weighs the data term of later actors, which data_weight=0 "
            "leaves out: set data_weight in (0, 1]."
        )


def check_combined(loss: Any) -> None:
    """Check the settings of a :class:`~pogo_torchrl.POGOLoss` that depend on each other."""
    check_exact(loss.w2_backend, loss.num_samples)
    check_trajectory_weights(loss.trajectory_weights, loss.data_weight)


def check_change_of_weights(w2_weights: Sequence[float], count: int) -> tuple[float, ...]:
    """Return new weights of a chain that exists already.

    Args:
        w2_weights: the weights.
        count: number of weights that the chain was created with.

    Raises:
        ValueError: if they are invalid, or as many as another chain has.
    """
    weights = check_weights(w2_weights) if count else tuple(w2_weights)
    if len(weights) != count:
        raise ValueError(
            f"w2_weights={w2_weights!r} has {len(weights)} weights, but the chain was created with "
            f"{count}: set as many, or create another loss."
        )
    return weights
