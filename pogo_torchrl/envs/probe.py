"""One reset and one step of an environment, checked before anything is trained for it."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

_RESET = "reset(seed=...) must return (observation, info)"
_STEP = "step(action) must return (observation, reward, terminated, truncated, info)"


def env_name(env: gymnasium.Env) -> str:
    """Name of an environment in messages: its ID, or its class."""
    spec = env.unwrapped.spec
    return f"env.id={spec.id}" if spec is not None else type(env.unwrapped).__name__


def check_spaces(env: gymnasium.Env) -> None:
    """Check that observations and actions are vectors, and actions bounded real numbers.

    Args:
        env: the environment.

    Raises:
        ValueError: if they are not.
    """
    for kind, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise ValueError(
                f"{env} has {kind} in {space}, but vectors (a one-dimensional Box) "
                "are required: choose another task or env.id."
            )
    actions: Any = env.action_space
    if not np.issubdtype(actions.dtype, np.floating):
        raise ValueError(
            f"{env_name(env)} has actions in {actions}, but real numbers are required: choose an "
            "environment with continuous actions."
        )
    if not (np.isfinite(actions.low) & np.isfinite(actions.high)).all():
        raise ValueError(
            f"{env_name(env)} has actions without bounds ({actions}), which actors need: set "
            "env.action_bounds=[low,high]."
        )
    if not (actions.low < actions.high).all():
        raise ValueError(
            f"{env_name(env)} has actions in {actions}, whose lower bounds are not below the upper "
            "ones: correct its action_space."
        )


def probe(env: gymnasium.Env) -> None:
    """Reset an environment and step it once, so that its mistakes show before training.

    Args:
        env: an environment that passes :func:`check_spaces`.

    Raises:
        ValueError: if it does not follow Gymnasium's interface, if a call fails, or for
            observations of other shapes than its ``observation_space`` or that are not numbers.

    Example:
        >>> from pogo_torchrl.envs import make_env
        >>> probe(make_env("hopper-medium-v2"))
        >>> class Old(gymnasium.Env):
        ...     observation_space = action_space = Box(-1, 1, (1,))
        ...     def reset(self, seed=None, options=None):
        ...         return np.zeros(1)
        >>> probe(Old())
        Traceback (most recent call last):
            ...
        ValueError: Old: reset(seed=...) must return (observation, info), but returned one \
ndarray: update it to Gymnasium's interface.
    """
    name, actions = env_name(env), env.action_space
    assert isinstance(actions, Box)
    action = ((actions.low + actions.high) / 2).astype(np.float32)
    found = _call(env, "reset", _RESET, seed=0)
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
        raise _interface_error(name, _RESET, found)
    _check_observation(env, found[0], "reset()")
    found = _call(env, "step", _STEP, action)
    if not isinstance(found, tuple) or len(found) != 5:
        raise _interface_error(name, _STEP, found)
    observation, reward, terminated, truncated, _ = found
    if not (terminated or truncated):
        _check_observation(env, observation, "step()")
    for what, value, kinds in (
        ("reward", reward, "biuf"),
        ("terminated", terminated, "biu"),
        ("truncated", truncated, "biu"),
    ):
        array = np.asarray(value)
        if array.size != 1 or array.dtype.kind not in kinds:
            wanted = "a number" if what == "reward" else "true or false"
            raise ValueError(
                f"{name}: step() returned {what}={_shorten(value)}, which must be {wanted}: "
                "correct the environment."
            )
    if not np.isfinite(np.asarray(reward, dtype=float)).all():
        raise ValueError(
            f"{name}: step() returned a reward of {reward}, which must be finite: correct the "
            "environment."
        )


def _call(env: gymnasium.Env, method: str, rule: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return getattr(env, method)(*args, **kwargs)
    except Exception as error:  # anything, in a user's environment
        # Wrappers fail where the environment below them has gym's old interface.
        try:
            below = getattr(env.unwrapped, method)(*args, **kwargs)
        except Exception:
            below = None
        expected = 2 if method == "reset" else 5
        if below is not None and (not isinstance(below, tuple) or len(below) != expected):
            raise _interface_error(env_name(env), rule, below) from error
        raise ValueError(
            f"{env_name(env)}: {method}() failed before training ({type(error).__name__}: "
            f"{_shorten(error)}); {rule}, as in Gymnasium."
        ) from error


def _interface_error(name: str, rule: str, found: Any) -> ValueError:
    what = f"{len(found)} values" if isinstance(found, tuple) else f"one {type(found).__name__}"
    return ValueError(f"{name}: {rule}, but returned {what}: update it to Gymnasium's interface.")


def _check_observation(env: gymnasium.Env, observation: Any, method: str) -> None:
    array, wanted = np.asarray(observation), env.observation_space.shape
    if array.shape != wanted or array.dtype.kind not in "biuf":
        raise ValueError(
            f"{env_name(env)}: {method} returned an observation of shape {array.shape} and dtype "
            f"{array.dtype}, but its observation_space has {wanted} numbers: correct the "
            "environment."
        )
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32))
    if not finite.all():
        raise ValueError(
            f"{env_name(env)}: {method} returned the observation {_shorten(array.tolist())}, which "
            "is not finite in float32: correct the environment."
        )


def _shorten(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
