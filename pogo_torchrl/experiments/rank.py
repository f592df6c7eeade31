"""Command ``pogo rank``: rank the actors of a trained chain without an environment."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pogo_torchrl.experiments.config import option, option_lines, options
from pogo_torchrl.experiments.csv_log import CSVSink
from pogo_torchrl.experiments.overrides import parse_options, wants_help
from pogo_torchrl.experiments.run import RunInProgress
from pogo_torchrl.experiments.trained_run import open_run
from pogo_torchrl.objectives.settings import check_gamma
from pogo_torchrl.progress import progress_bar
from pogo_torchrl.report import rank_correlation
from pogo_torchrl.report.run_logs import read_evaluations
from pogo_torchrl.trainers.ranking import OfflineValue, rank_actors, ranking_rows


@dataclass
class RankConfig:
    """Options of ``pogo rank``."""

    run: str | None = option(
        None, "folder of a run, LOG_DIR/TASK/w2_WEIGHTS/seed_SEED; `run=` may be omitted", path=True
    )
    updates: int = option(3000, "number of updates of the critics")
    critics: int = option(
        4, "critics per actor, each fitted to its own bootstrap sample of the episodes", highest=100
    )
    gamma: float | None = option(
        None, "discount factor of the values, in [0, 1); null: that of the run"
    )
    seed: int = option(0, "seed of the critics and of resampling", lowest=0, highest=2**32 - 1)
    device: str = option("auto", "device of the critics: auto (a GPU if available), cpu or cuda")
    progress_bar: bool = option(True, "show a progress bar")


def rank(arguments: Sequence[str]) -> list[OfflineValue]:
    """Rank the actors of a run by fitted Q evaluation, print a table and write ``ranking.csv``.

    Args:
        arguments: options of :class:`RankConfig` as ``option=value`` or ``--option value``; for
            the run, its folder alone suffices.

    Returns:
        One value per actor of the newest checkpoint.

    Raises:
        ValueError: for unknown options, invalid values, or a run without a checkpoint.
        OSError: if there is no run in the folder, or its files cannot be read or written.
    """
    cfg = parse_options(arguments, RankConfig(), "run")
    if cfg.run is None:
        raise ValueError("run is missing: write pogo rank FOLDER, with the folder of a run.")
    if cfg.gamma is not None:
        check_gamma(cfg.gamma)
    run = open_run(cfg.run, device=cfg.device, environment=False)
    gamma = run.cfg.gamma if cfg.gamma is None else cfg.gamma
    if gamma == 1:
        raise ValueError("gamma=1.0 has no bound on the values: give gamma < 1, e.g. gamma=0.99.")
    transitions = run.replay_buffer[:].clone(False)
    # Values in units of the data's rewards, which algorithm=iql scales for its training.
    transitions["next", "reward"] = transitions["next", "reward"] / run.reward_scale
    started = time.perf_counter()
    with progress_bar(total=cfg.updates, unit=" updates", disable=not cfg.progress_bar) as bar:
        try:
            values = rank_actors(
                run.deployed_actors(),
                transitions,
                gamma=gamma,
                updates=cfg.updates,
                num_critics=cfg.critics,
                seed=cfg.seed,
                progress=lambda step: bar.update(step - bar.n),
            )
        except FloatingPointError as error:
            raise ValueError(str(error)) from error
    rows = ranking_rows(values, time.perf_counter() - started)
    step, file = run.trainer.collected_frames, run.folder.training / "ranking.csv"
    print(
        f"Actors of {cfg.run} at update {step}, by fitted Q evaluation ({cfg.updates} updates, "
        f"gamma {gamma:g})"
    )
    print(ranking_table(values, _scores(run), run.measure.name))
    CSVSink(file, resume_step=step - 1).write(step, rows)  # may fail, which costs the file alone
    print(f"Written to {file}", flush=True)
    return values


def ranking_table(
    values: Sequence[OfflineValue],
    scores: Sequence[float] | None = None,
    measure: str = "D4RL score",
) -> str:
    """Format a ranking as a table, with the true scores beside it.

    Args:
        values: the result of :func:`~pogo_torchrl.trainers.ranking.rank_actors`.
        scores: score or return of each actor. Defaults to ``None``: unknown.
        measure: what ``scores`` are. Defaults to ``"D4RL score"``.

    Example:
        >>> values = [OfflineValue(0, 10.0, 9.0, 11.0, 2), OfflineValue(1, 12.0, 11.5, 13.0, 1)]
        >>> print(ranking_table(values, [40.0, 55.5]))
          actor   FQE value         95 % interval    rank  D4RL score
              0        10.0        [9.0,    11.0]       2        40.0
              1        12.0       [11.5,    13.0]       1        55.5
        Rank correlation of values and scores (Spearman): 1.00
    """
    rows = [("actor", "FQE value", "95 % interval", "rank", measure)]
    for v in values:
        score = "" if scores is None else f"{scores[v.actor]:.1f}"
        interval = f"[{v.low:.1f}, {v.high:7.1f}]"
        rows.append((str(v.actor), f"{v.value:.1f}", interval, str(v.rank), score))
    columns = list(zip(*rows))[: 4 if scores is None else 5]
    widths = [
        max(width, *(len(cell) + 2 for cell in column))
        for width, column in zip((7, 12, 22, 8, 12), columns)
    ]
    lines = ["".join(f"{c:>{w}}" for c, w in zip(row, widths)) for row in rows]
    if scores is not None and len(values) > 1:
        correlation = rank_correlation([v.value for v in values], scores)
        if not math.isnan(correlation):  # scores or values are all equal
            shown = "returns" if measure == "return" else "scores"
            lines.append(f"Rank correlation of values and {shown} (Spearman): {correlation:.2f}")
    return "\n".join(lines)


def _scores(run: RunInProgress) -> list[float] | None:
    """Deterministic scores, or returns, of the evaluation at the same update, if there is one."""
    path = run.folder.training / "evaluations.csv"
    found = read_evaluations(Path(path), run.loss.num_actors)
    at_end = found.values[found.steps == run.trainer.collected_frames]
    return at_end[0, :, 0].tolist() if len(at_end) else None


def main(arguments: Sequence[str]) -> None:
    """Run ``pogo rank``.

    Args:
        arguments: options of :class:`RankConfig`, see :func:`rank`, which also says what is raised.
    """
    if wants_help(arguments):
        print(_HELP)
        print("\n".join(option_lines(options(RankConfig))))
    else:
        rank(arguments)


_HELP = """\
Rank the actors of a trained chain by fitted Q evaluation on the run's data, without an environment.

  pogo rank FOLDER [option=value ...]

Options:"""
