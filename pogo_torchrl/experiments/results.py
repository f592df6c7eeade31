"""Files that a run writes after its last update."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pogo_torchrl.experiments.console import LOGGER
from pogo_torchrl.experiments.run_folder import RunFolder
from pogo_torchrl.export import save_actors
from pogo_torchrl.files import atomic_write, cannot_write
from pogo_torchrl.modules import TransportActor
from pogo_torchrl.report import plot_curves, score_table


def write_results(
    cfg: DictConfig,
    folder: RunFolder,
    chain: Sequence[TransportActor],
    updates: int,
    *,
    behaviour: float,
    measure: str | None,
) -> None:
    """Export the policy, show the scores, draw the curves, and mark the run as complete.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.
        folder: the folders of the run.
        chain: the actors to be deployed, on raw observations.
        updates: number of updates that were made.

    Keyword Args:
        behaviour: mean score or return of the data.
        measure: what the evaluations show, e.g. ``"D4RL score"``; ``None``: there are none.

    Raises:
        OSError: if a file cannot be written; the message names the option of its folder.
    """
    evaluations, curves = folder.training / "evaluations.csv", folder.training / "curves.png"
    if cfg.save_model:
        environment: Any = OmegaConf.to_container(cfg.env, resolve=True)
        try:
            save_actors(
                folder.policy,
                chain,
                hidden_sizes=cfg.hidden_sizes,
                environment={"task": cfg.task, **environment},
                averaged=cfg.average_actors is not None,
            )
        except OSError as error:
            raise cannot_write(folder.checkpoints, "checkpoint_dir", error) from error
    if measure is not None:
        LOGGER.info("%s", score_table(evaluations, behaviour, measure=measure))
    LOGGER.info("Logs:        %s", folder.training)
    if measure is not None:
        try:
            plot_curves(
                evaluations, curves, title=cfg.task, behaviour_score=behaviour, measure=measure
            )
            LOGGER.info("Curves:      %s", curves)
        except Exception as error:  # `pogo report` draws them again
            LOGGER.warning("The curves cannot be drawn (%s).", error)
    LOGGER.info("Checkpoints: %s", folder.checkpoints)
    if cfg.save_model:
        LOGGER.info("Policy:      %s (load_actors(...)[-1] is the last actor)", folder.policy)
    try:
        with atomic_write(folder.done, "x") as file:  # last: it marks the run as complete
            json.dump({"total_steps": updates}, file)
    except OSError as error:
        raise cannot_write(folder.root, "log_dir", error) from error
