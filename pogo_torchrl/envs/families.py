"""D4RL's tasks whose environments are not part of this package."""

from __future__ import annotations

import re

_OWN_ENVIRONMENT = (
    "its environment is not part of this package, but its data train with one of your own: set "
    "data.source=hdf5, data.path=FILE and env.id=MODULE:ID ({example}), or eval_interval=0 to "
    "train without evaluation"
)
_ADROIT = _OWN_ENVIRONMENT.format(example="e.g. Gymnasium-Robotics' AdroitHand{hand}-v1")

# Pattern of the names, what they are, and what can be done with them.
_FAMILIES: tuple[tuple[str, str, str], ...] = (
    (
        r"(hopper|halfcheetah|walker2d)-(random|medium|expert|medium-replay|full-replay|"
        r"medium-expert)-v[01]|antmaze-[a-z-]+-v[01]",
        "version {version} of a D4RL task",
        "only version 2 is supported: use {name}-v2",
    ),
    (
        r"maze2d-.*",
        "D4RL's Maze2D (a point mass in a maze)",
        _OWN_ENVIRONMENT.format(example="e.g. Gymnasium-Robotics' PointMaze"),
    ),
    (r"pen-.*", "D4RL's Adroit hand with a pen", _ADROIT.format(hand="Pen")),
    (r"door-.*", "D4RL's Adroit hand at a door", _ADROIT.format(hand="Door")),
    (r"hammer-.*", "D4RL's Adroit hand with a hammer", _ADROIT.format(hand="Hammer")),
    (r"relocate-.*", "D4RL's Adroit hand with a ball", _ADROIT.format(hand="Relocate")),
    (
        r"(mini-)?kitchen-.*",
        "D4RL's FrankaKitchen",
        _OWN_ENVIRONMENT.format(example="one with D4RL's 60 observations"),
    ),
    (
        r"ant-.*",
        "D4RL's Gym-MuJoCo ant",
        _OWN_ENVIRONMENT.format(example="one with D4RL's 111 observations"),
    ),
    (
        r"bullet-.*",
        "D4RL's PyBullet locomotion",
        _OWN_ENVIRONMENT.format(example="one of PyBullet"),
    ),
    (
        r"flow-.*",
        "D4RL's Flow (traffic control)",
        _OWN_ENVIRONMENT.format(example="one of Flow and SUMO"),
    ),
    (
        r"carla-.*",
        "D4RL's CARLA (driving from camera images)",
        "not supported, as networks here take vectors, no images, and CARLA's simulator is "
        "not part of this package",
    ),
    (
        r"(minigrid|gym_minigrid)[-_].*",
        "D4RL's Minigrid",
        "not supported, as its actions are discrete, and the networks here act continuously",
    ),
)


def other_family(task: str) -> str | None:
    """Say what a task of D4RL is that this package has no environment for.

    Args:
        task: name of a task.

    Returns:
        One sentence: what it is, and why it is not supported or how it is; ``None`` for any name
        that is not one of D4RL's.

    Source: Fu et al., *D4RL: Datasets for Deep Data-Driven Reinforcement Learning*, 2020,
    arXiv:2004.07219.

    Example:
        >>> print(other_family("carla-lane-v0"))
        ... # doctest: +NORMALIZE_WHITESPACE
        task=carla-lane-v0 is D4RL's CARLA (driving from camera images): not supported, as
        networks here take vectors, no images, and CARLA's simulator is not part of this package.
        >>> other_family("hopper-medium-v2") is None
        True
    """
    for pattern, what, remedy in _FAMILIES:
        if re.fullmatch(pattern, task):
            name, _, version = task.rpartition("-v")
            what, remedy = (
                what.format(version=version),
                remedy.format(name=name.replace("-eval", "")),
            )
            return f"task={task} is {what}: {remedy}."
    return None
