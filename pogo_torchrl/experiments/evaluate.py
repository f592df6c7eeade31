"""The command ``pogo evaluate``: score an exported chain, and film it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pogo_torchrl.evaluation import Evaluation, Evaluator
from pogo_torchrl.experiments.build import env_fn
from pogo_torchrl.experiments.config import EnvConfig, option, option_lines, options
from pogo_torchrl.experiments.console import exit_with_error
from pogo_torchrl.experiments.film import check_film, film
from pogo_torchrl.experiments.overrides import parse_options, wants_help
from pogo_torchrl.export import load_actors, policy_environment
from pogo_torchrl.modules import TransportActor


@dataclass
class EvaluateConfig:
    """Every option of ``pogo evaluate``."""

    policy: str | None = option(None, "the policy.safetensors of a run; its name may go first")
    task: str | None = option(
        None, "D4RL task whose environment and scores are used; null: that of the policy's run"
    )
    episodes: int = option(10, "episodes per actor and action mode", highest=100_000)
    seed: int = option(0, "seed of start states and noise", lowest=0, highest=2**32 - 1)
    video: str | None = option(None, "MP4 file: an episode of every actor, side by side")
    env: EnvConfig = field(default_factory=EnvConfig)


def evaluate(arguments: Sequence[str]) -> list[Evaluation]:
    """Score every actor of an exported chain in both modes, and print a table.

    Args:
        arguments: options of :class:`EvaluateConfig`, ``"option=value"`` or ``"--option value"``;
            the policy may stand alone.

    Returns:
        The evaluations, actor by actor, mode by mode. With the ``seed`` and ``episodes`` of the
        training they equal its last ones.

    Raises:
        ValueError: for unknown options, and values and files that do not fit.
        OSError: when the policy cannot be read, or the film not be written.
    """
    cfg = parse_options(arguments, EvaluateConfig(), "policy")
    if cfg.policy is None:
        raise ValueError("policy is missing: write pogo evaluate POLICY.safetensors.")
    actors = load_actors(cfg.policy)
    stored = policy_environment(cfg.policy)
    if cfg.task in (None, stored.get("task")):
        cfg = parse_options(arguments, _defaults(stored), "policy")
    if cfg.task is None:
        raise ValueError(f"{cfg.policy} does not say its task: write task=hopper-medium-v2 or so.")
    evaluator = Evaluator(
        cfg.task, episodes=cfg.episodes, seed=cfg.seed, env_fn=env_fn(cfg.task, cfg.env)
    )
    _check_sizes(cfg.policy, actors, evaluator)
    path = None if cfg.video is None else Path(cfg.video).expanduser()
    if path is not None:
        drawing = env_fn(cfg.task, cfg.env, render_mode="rgb_array")
        check_film(path, drawing)
    evaluations = evaluator(actors)
    count = f"{cfg.episodes} episode{'s' if cfg.episodes > 1 else ''}"
    print(f"{cfg.policy} on {cfg.task}, {count}, seed {cfg.seed} (mean ± std)")
    print(evaluation_table(evaluations), flush=True)
    if path is not None:
        frames = film(path, actors, drawing, evaluator.start_seed(0))
        print(f"Video: {path} ({frames} frames; actors 0 to {len(actors) - 1} from the left)")
    return evaluations


def evaluation_table(evaluations: Sequence[Evaluation]) -> str:
    """A row for each actor and mode: return, D4RL score and length of the episodes.

    Example:
        >>> import numpy as np
        >>> both = [Evaluation(0, mode, np.array([2.0, 4.0]), np.array([10, 12]),
        ...                    np.array([1.0, 2.0])) for mode in ("deterministic", "stochastic")]
        >>> print(evaluation_table(both))
          actor  mode                   return     D4RL score         length
              0  deterministic       3.0 ± 1.0      1.5 ± 0.5     11.0 ± 1.0
              0  stochastic          3.0 ± 1.0      1.5 ± 0.5     11.0 ± 1.0
    """
    lines = [f"  {'actor':>5}  {'mode':13}{'return':>16}{'D4RL score':>15}{'length':>15}"]
    for e in evaluations:
        numbers = [f"{v.mean():.1f} ± {v.std():.1f}" for v in (e.returns, e.scores, e.lengths)]
        lines.append(f"  {e.actor:>5}  {e.mode:13}{numbers[0]:>16}{numbers[1]:>15}{numbers[2]:>15}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """The command line of :func:`evaluate`.

    Exit code: 2 for bad input and files that cannot be read or written, after one sentence.
    """
    if wants_help(arguments):
        print(_help())
        return
    try:
        evaluate(arguments)
    except (ValueError, OSError, ImportError) as error:
        exit_with_error(error)


def _defaults(stored: dict) -> EvaluateConfig:
    """The options of the run that a policy was trained by."""
    names = {entry.name for entry in dataclasses.fields(EnvConfig)}
    env = EnvConfig(**{name: value for name, value in stored.items() if name in names})
    return EvaluateConfig(task=stored.get("task"), env=env)


def _check_sizes(policy: str, actors: Sequence[TransportActor], evaluator: Evaluator) -> None:
    found = actors[0].module.mean.shape[-1], actors[0].action_spec.shape[-1]
    needed = evaluator.observation_dim, evaluator.action_dim
    if found != needed:
        raise ValueError(
            f"{policy} takes observations and actions of size {found}, task={evaluator.task} has "
            f"{needed}: give the task (or env.id) that it was trained for."
        )


def _help() -> str:
    return "\n".join(
        [
            "Score every actor of a trained chain, with z = 0 and with z ~ N(0, I), and film it.",
            "",
            "  pogo evaluate POLICY.safetensors [option=value ...]",
            "",
            "Options:",
            *option_lines(options(EvaluateConfig)),
        ]
    )
