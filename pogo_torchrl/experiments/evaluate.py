"""Command ``pogo evaluate``: score an exported chain and record a video of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from pogo_torchrl.evaluation import Evaluation, Evaluator
from pogo_torchrl.experiments.config import EnvConfig, option, option_lines, options
from pogo_torchrl.experiments.film import check_film, film
from pogo_torchrl.experiments.overrides import parse_options, wants_help
from pogo_torchrl.experiments.simulator import env_fn
from pogo_torchrl.export import load_actors, policy_environment, policy_weights
from pogo_torchrl.modules import TransportActor


@dataclass
class EvaluateConfig:
    """Options of ``pogo evaluate``."""

    policy: str | None = option(
        None, "policy.safetensors file of a run; `policy=` may be omitted", path=True
    )
    task: str | None = option(
        None,
        "D4RL task that sets the environment and the score, or a task of your own, with env.id; "
        "null: the task of the policy's run",
    )
    episodes: int = option(
        10, "episodes per actor and action mode (deterministic, stochastic)", highest=100_000
    )
    eval_envs: int | None = option(
        None,
        "largest number of environments that exist at once; null: 1, or as memory allows for those "
        "of Gymnasium and of this package",
    )
    seed: int = option(0, "seed of initial states and action noise", lowest=0, highest=2**32 - 1)
    video: str | None = option(
        None, "MP4 file to write, showing one episode of every actor; null: no video", path=True
    )
    env: EnvConfig = field(default_factory=EnvConfig)


def evaluate(arguments: Sequence[str]) -> list[Evaluation]:
    """Score every actor of an exported chain in both action modes and print a table.

    Args:
        arguments: options of :class:`EvaluateConfig` as ``option=value`` or ``--option value``; for
            the policy, the file name alone suffices.

    Returns:
        One evaluation per actor and action mode. With the ``seed`` and ``episodes`` used in
        training, they equal the last evaluation of the training run.

    Raises:
        ValueError: for unknown options, invalid values, or a policy that does not fit the task.
        OSError: if the policy cannot be read or the video cannot be written.
    """
    cfg = parse_options(arguments, EvaluateConfig(), "policy")
    if cfg.policy is None:
        raise ValueError("policy is missing: write pogo evaluate POLICY.safetensors.")
    actors = load_actors(cfg.policy)
    stored = policy_environment(cfg.policy)
    if cfg.task in (None, stored.get("task")):
        cfg = parse_options(arguments, _defaults(stored), "policy")
    if cfg.task is None:
        raise ValueError(
            f"{cfg.policy} does not contain its task: set it, e.g. task=hopper-medium-v2."
        )
    evaluator = Evaluator(
        cfg.task,
        episodes=cfg.episodes,
        seed=cfg.seed,
        env_fn=env_fn(cfg.task, cfg.env),
        reference_scores=cfg.env.reference_scores,
        eval_envs=cfg.eval_envs,
    )
    path = None if cfg.video is None else Path(cfg.video)
    with closing(evaluator):
        _check_sizes(cfg.policy, actors, evaluator)
        evaluator.check()
        if path is not None:
            evaluator.close()  # where only one environment may exist at a time
            drawing = env_fn(cfg.task, cfg.env, render_mode="rgb_array")
            check_film(path, drawing)
        evaluations = evaluator(actors)
    count = f"{cfg.episodes} episode{'s' if cfg.episodes > 1 else ''}"
    weights = ", averaged weights" if policy_weights(cfg.policy) == "averaged" else ""
    print(f"{cfg.policy} on {cfg.task}, {count}, seed {cfg.seed}{weights} (mean ± std)")
    print(evaluation_table(evaluations, evaluator.measure.name), flush=True)
    if path is not None:
        at_once = evaluator.eval_envs >= len(actors)
        frames = film(path, actors, drawing, evaluator.start_seed(0), at_once=at_once)
        print(f"Video: {path} ({frames} frames; actors 0 to {len(actors) - 1} from the left)")
    return evaluations


def evaluation_table(evaluations: Sequence[Evaluation], measure: str = "D4RL score") -> str:
    """Format evaluations as a table of returns, scores (if any) and episode lengths.

    Args:
        evaluations: one row each.
        measure: name of the scores. Defaults to ``"D4RL score"``.

    Returns:
        The table as text, with mean ± standard deviation over episodes.

    Example:
        >>> import numpy as np
        >>> both = [Evaluation(0, mode, np.array([2.0, 4.0]), np.array([10, 12]),
        ...                    np.array([1.0, 2.0])) for mode in ("deterministic", "stochastic")]
        >>> print(evaluation_table(both))
          actor  mode                   return     D4RL score         length
              0  deterministic       3.0 ± 1.0      1.5 ± 0.5     11.0 ± 1.0
              0  stochastic          3.0 ± 1.0      1.5 ± 0.5     11.0 ± 1.0
        >>> print(evaluation_table([both[0]._replace(scores=None)]))
          actor  mode                   return         length
              0  deterministic       3.0 ± 1.0     11.0 ± 1.0
    """
    scored = evaluations[0].scores is not None
    rows = [["return", *([measure] if scored else []), "length"]]
    for e in evaluations:
        values = [e.returns, *([] if e.scores is None else [e.scores]), e.lengths]
        rows.append([f"{v.mean():.1f} ± {v.std():.1f}" for v in values])
    widths = [max(14, *map(len, column)) + 1 for column in zip(*rows)]
    names = [f"  {'actor':>5}  {'mode':14}", *(f"  {e.actor:>5}  {e.mode:14}" for e in evaluations)]
    return "\n".join(
        name + "".join(f"{cell:>{width}}" for cell, width in zip(row, widths))
        for name, row in zip(names, rows)
    )


def main(arguments: Sequence[str]) -> None:
    """Run ``pogo evaluate``.

    Args:
        arguments: options of :class:`EvaluateConfig`, see :func:`evaluate`, which also says what is
            raised.
    """
    if wants_help(arguments):
        print(_help())
    else:
        evaluate(arguments)


def _defaults(stored: dict) -> EvaluateConfig:
    """Defaults from the run that trained the policy."""
    names = {entry.name for entry in dataclasses.fields(EnvConfig)}
    env = EnvConfig(**{name: value for name, value in stored.items() if name in names})
    return EvaluateConfig(task=stored.get("task"), env=env)


def _check_sizes(policy: str, actors: Sequence[TransportActor], evaluator: Evaluator) -> None:
    found = actors[0].module.mean.shape[-1], actors[0].action_spec.shape[-1]
    needed = evaluator.observation_dim, evaluator.action_dim
    if found != needed:
        raise ValueError(
            f"{policy} expects observations and actions of size {found}, but task={evaluator.task} "
            f"has {needed}: use the task (or env.id) it was trained for."
        )


def _help() -> str:
    return "\n".join(
        [
            "Score every actor of a trained chain, with z = 0 (deterministic) and z ~ N(0, I) "
            "(stochastic).",
            "",
            "  pogo evaluate POLICY.safetensors [option=value ...]",
            "",
            "Options:",
            *option_lines(options(EvaluateConfig)),
        ]
    )
