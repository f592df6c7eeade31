"""Dictionaries of observations as vectors, in one order for environments and data."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple, flatdim, flatten
from gymnasium.wrappers import TransformObservation
from numpy.typing import NDArray


def flatten_observations(env: gymnasium.Env) -> gymnasium.Env:
    """Turn the ``Dict`` observations of an environment into vectors.

    The order is that of :func:`gymnasium.spaces.flatten` for the environment's observation space:
    entry by entry, nested ones too, arrays in C order, ``Discrete`` values as one-hot vectors.
    Gymnasium sorts the entries by key where the space was made from a dictionary, and keeps the
    order of keyword arguments and of an ``OrderedDict``. :func:`flatten_rows` flattens data.

    Args:
        env: the environment.

    Returns:
        The environment with vectors as observations, and its ``Dict`` as ``dict_space``; ``env``
        itself, if it has no ``Dict``.

    Raises:
        ValueError: for entries that cannot be part of a vector, such as images.

    Example:
        >>> import gymnasium
        >>> from gymnasium.spaces import Box, Dict
        >>> class Arm(gymnasium.Env):
        ...     observation_space = Dict({"velocity": Box(-1, 1, (2,)), "angle": Box(-3, 3, (1,))})
        ...     action_space = Box(-1, 1, (1,))
        ...     def reset(self, *, seed=None, options=None):
        ...         return {"velocity": np.array([1.0, 0.5]), "angle": np.array([3.0])}, {}
        >>> flatten_observations(Arm()).reset()[0].tolist()
        [3.0, 1.0, 0.5]
    """
    if not isinstance(env.observation_space, Dict):
        return env
    try:
        check_entries(env.observation_space)
    except ValueError as error:
        raise ValueError(f"{env} has observations that are not vectors: {error}") from error
    return _Flattened(env)


class _Flattened(TransformObservation):
    """The environment, with vectors as observations."""

    def __init__(self, env: gymnasium.Env) -> None:
        self.dict_space = space = env.observation_space
        vectors = Box(-np.inf, np.inf, (flatdim(space),), np.float64)
        super().__init__(env, lambda observation: flatten(space, observation), vectors)


def check_entries(space: Any) -> None:
    """Check that a space can be flattened to a vector.

    Args:
        space: the space.

    Raises:
        ValueError: for entries that cannot be part of a vector, such as images.
    """
    if isinstance(space, Dict | Tuple):
        for part in space.spaces.values() if isinstance(space, Dict) else space.spaces:
            check_entries(part)
        return
    image = isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) > 1
    if image or not isinstance(space, Box | Discrete | MultiBinary):
        raise ValueError(
            f"{space} cannot be part of a vector; only Box (no images), Discrete and MultiBinary "
            "can, and Dict and Tuple of these."
        )


def flatten_rows(space: Any, values: Any) -> NDArray[Any]:
    """Flatten many observations at once; each row is :func:`gymnasium.spaces.flatten` of one.

    Args:
        space: a space that passes :func:`check_entries`.
        values: arrays ``[n, ...]``, in the dictionaries and tuples of the space.

    Returns:
        The observations, ``[n, k]``.

    Raises:
        KeyError: if an entry is missing.
        ValueError: if an array does not match the space.

    Example:
        >>> space = Dict({"b": Box(-1, 1, (2,)), "a": Discrete(3)})
        >>> flatten_rows(space, {"b": np.zeros((2, 2)), "a": np.array([2, 0])}).tolist()
        [[0.0, 0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]]
    """
    if isinstance(space, Dict):
        parts = [flatten_rows(part, values[key]) for key, part in space.spaces.items()]
        return np.concatenate(parts, axis=-1)
    if isinstance(space, Tuple):
        parts = [flatten_rows(part, one) for part, one in zip(space.spaces, values, strict=True)]
        return np.concatenate(parts, axis=-1)
    if isinstance(space, Discrete):
        index = np.asarray(values).reshape(-1) - int(space.start)
        if not np.isin(index, np.arange(int(space.n))).all():
            raise ValueError(f"observations have values that are not in {space}")
        return np.eye(int(space.n))[index.astype(int)]
    array = np.asarray(values)
    if array.shape[1:] != space.shape:
        raise ValueError(f"observations of shape {array.shape[1:]} are not in {space}")
    return array.reshape(len(array), -1)
