"""Command ``pogo finetune``: a trained chain continues to learn in an environment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBufferEnsemble, TensorDictReplayBuffer
from torchrl.envs import Compose, DoubleToFloat, GymWrapper, ObservationNorm, TransformedEnv
from torchrl.envs.transforms import RewardScaling

from pogo_torchrl.data import OfflineReplayBuffer
from pogo_torchrl.evaluation import Evaluation
from pogo_torchrl.experiments.build import deterministic, env_fn
from pogo_torchrl.experiments.config import option, option_lines, options
from pogo_torchrl.experiments.console import LOGGER, ConsoleHandler, log_to
from pogo_torchrl.experiments.overrides import parse_options, wants_help
from pogo_torchrl.experiments.run import RunInProgress
from pogo_torchrl.experiments.run_folder import (
    RunFolder,
    check_run_folder,
    fingerprint,
    lock_run_folder,
)
from pogo_torchrl.experiments.signals import stop_on_signals
from pogo_torchrl.experiments.train import exit_codes
from pogo_torchrl.experiments.trained_run import open_run
from pogo_torchrl.functional import step_sizes_to_weights
from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.objectives.settings import check_positive
from pogo_torchrl.screen import expendable_screen
from pogo_torchrl.trainers.freeze import copy_weights


@dataclass
class FinetuneConfig:
    """Options of ``pogo finetune``."""

    run: str | None = option(
        None, "folder of a run, LOG_DIR/TASK/w2_WEIGHTS/seed_SEED; `run=` may be omitted", path=True
    )
    env_steps: int = option(20_000, "steps in the environment, in total")
    updates_per_step: int = option(1, "training updates per step in the environment", highest=100)
    actor: int = option(
        -1, "index of the actor to start from, which collects data; -1: the last one", lowest=-32,
        highest=31,
    )  # fmt: skip
    exploration_noise: float = option(
        0.3, "standard deviation of the noise on collected actions, in units of half their range"
    )
    flow_updates: int = option(
        3000,
        "updates of the later actors after all steps in the environment, which then flow from "
        "actor along frozen critics; 0: train all networks together during the steps instead",
        lowest=0,
    )
    step_size: float = option(0.02, "step size h_i of each later actor in this flow, > 0")
    seed: int = option(
        0, "seed of the environment, sampling, noise and evaluation", lowest=0, highest=2**32 - 1
    )
    out: str | None = option(None, "folder to write to; null: RUN/finetune/seed_SEED", path=True)
    eval_interval: int = option(2000, "updates between evaluations; the first is before training")
    eval_episodes: int = option(
        10, "episodes of an evaluation, per actor and action mode", highest=10_000
    )
    log_interval: int = option(500, "updates between rows of metrics.csv")
    checkpoint_interval: int = option(5000, "updates between checkpoints; one is at the end")
    resume: bool = option(False, "continue from the newest checkpoint in the folder")
    device: str = option("auto", "device to train on: auto (a GPU if available), cpu or cuda")
    compile: str = option("auto", "torch.compile the update: true, false or auto")
    progress_bar: bool = option(True, "show a progress bar with speed and remaining time")


class OnlineBuffer:
    """Replay buffer of a trainer that steps an environment before it samples.

    Half of every batch is offline data, half is new (TorchRL's ``ReplayBufferEnsemble``), as in
    Ball et al., *Efficient Online Reinforcement Learning with Offline Data*, 2023,
    arXiv:2302.02948. Batches are offline until there are enough new transitions for a half.

    Args:
        offline: the offline data.
        steps: iterator over new transitions ``[1]``.
        capacity: number of new transitions, after which the environment is no longer stepped.
        batch_size: size of a batch, at least 2.
        updates_per_step: number of samples per step in the environment.
    """

    def __init__(
        self,
        offline: OfflineReplayBuffer,
        steps: Iterator[TensorDictBase],
        *,
        capacity: int,
        batch_size: int,
        updates_per_step: int,
    ) -> None:
        self.offline, self.steps, self.updates_per_step = offline, steps, updates_per_step
        self.capacity = capacity
        # "auto": that of the rows, which have no device if the offline data have none.
        self.online = TensorDictReplayBuffer(storage=LazyTensorStorage(capacity, device="auto"))
        self.half = batch_size // 2
        self.both = ReplayBufferEnsemble(
            offline, self.online, sample_from_all=True, batch_size=2 * self.half
        )
        self.samples = 0
        self.keys = list(offline[:1].keys(True, True))

    def __len__(self) -> int:
        return len(self.offline)

    def __getitem__(self, index: Any) -> TensorDictBase:
        return self.offline[index]

    @property
    def storage(self) -> Any:
        """Storage of the offline data."""
        return self.offline.storage

    def sample(self) -> TensorDictBase:
        """Step the environment, if it is time to, and return a batch ``[B]``."""
        if self.samples % self.updates_per_step == 0 and len(self.online) < self.capacity:
            row = next(self.steps)
            if ("next", "action") in self.keys:  # of critic_bc_weight; unknown here
                row["next", "action"] = torch.full_like(row["action"], torch.nan)
            if "trajectory_weight" in self.keys:  # the mean over the offline data
                row["trajectory_weight"] = torch.ones(row.batch_size, device=row["action"].device)
            self._extend(row)
        self.samples += 1
        if len(self.online) < self.half:
            return self.offline.sample(2 * self.half).select(*self.keys)
        # A lazy stack would be indexed anew, row by row, at every access.
        return self.both.sample().select(*self.keys).contiguous().reshape(-1)

    def state_dict(self) -> dict[str, Any]:
        """Return the new transitions and the number of samples."""
        rows = self.online[:].select(*self.keys).to_dict() if len(self.online) else {}
        return {"samples": self.samples, "rows": rows}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state returned by :meth:`state_dict`."""
        self.samples = state_dict["samples"]
        self.online.empty()
        if state_dict["rows"]:
            rows = TensorDict.from_dict(state_dict["rows"], auto_batch_size=True, batch_dims=1)
            self._extend(rows)

    def _extend(self, rows: TensorDictBase) -> None:
        like = self.offline[:1]
        rows = rows.to(self.storage.device).select(*self.keys).clear_device_()
        self.online.extend(rows if like.device is None else rows.to(like.device))


def make_collector(
    make_env: Callable[[], gymnasium.Env],
    policy: TensorDictModule,
    offline: OfflineReplayBuffer,
    *,
    reward_shift: float = 0.0,
    exploration_noise: float = 0.0,
    seed: int = 0,
) -> Collector:
    """TorchRL collector of single steps, on observations and rewards as in the offline data.

    Args:
        make_env: function that creates the environment.
        policy: an actor on normalised observations, which acts with its own noise z.
        offline: the offline data, with their normalisation.

    Keyword Args:
        reward_shift: constant that was added to the rewards of the data. Defaults to ``0``.
        exploration_noise: standard deviation of Gaussian noise on the actions, in units of half
            their range; the sum is clipped to the bounds. Defaults to ``0``.
        seed: seed of the environment. Defaults to ``0``.
    """
    loc, scale = (values.cpu() for values in offline.normalization)
    env = TransformedEnv(
        GymWrapper(make_env()),
        Compose(
            DoubleToFloat(),
            ObservationNorm(loc, scale, in_keys=["observation"], standard_normal=True),
            RewardScaling(reward_shift, 1.0),
        ),
    )
    device = offline.storage.device
    low, high = env.action_spec.space.low.to(device), env.action_spec.space.high.to(device)

    def explore(action: Tensor) -> Tensor:
        noise = exploration_noise * (high - low) / 2 * torch.randn_like(action)
        return (action + noise).clamp(low, high)

    exploration = TensorDictModule(explore, ["action"], ["action"])
    collector = Collector(
        env,
        TensorDictSequential(policy, exploration) if exploration_noise else policy,
        frames_per_batch=1,
        policy_device=device,
        env_device="cpu",
        storing_device=device,
        track_traj_ids=False,
        auto_register_policy_transforms=False,  # the policy has no state, so it needs none
    )
    with torch.random.fork_rng([]):  # TorchRL seeds torch as well
        collector.set_seed(seed)
    return collector


class FineTuning(RunInProgress):
    """A run that continues from a trained one, in an environment.

    Args:
        cfg: a :class:`FinetuneConfig`.

    Raises:
        ValueError: for invalid settings; the message names them.
        OSError: if the run cannot be read.
    """

    def __init__(self, cfg: DictConfig) -> None:
        source = open_run(cfg.run, device=cfg.device)
        self.source, self.options = source, cfg
        if source.cfg.algorithm != "pogo":
            raise ValueError(
                f"{cfg.run} has algorithm={source.cfg.algorithm}, but pogo finetune continues runs "
                "of algorithm=pogo only."
            )
        number = source.loss.num_actors
        if not -number <= cfg.actor < number:
            raise ValueError(
                f"actor={cfg.actor} is out of range: the run has the actors 0 to {number - 1}, or "
                f"-{number} to -1 from the end."
            )
        if source.cfg.env.id is None:
            raise ValueError(
                f"{cfg.run} was trained without an environment (env.id=null), but fine-tuning "
                "needs one: set env.id in its training/config.yaml."
            )
        if cfg.flow_updates and number == 1:
            raise ValueError(
                f"{cfg.run} has a single actor, so that there are no later actors to flow from it: "
                "set flow_updates=0."
            )
        check_positive("step_size", cfg.step_size)
        check_positive("exploration_noise", cfg.exploration_noise, or_zero=True)
        if source.cfg.batch_size < 2:
            raise ValueError(
                "batch_size=1 has no halves of offline and new data: use a larger one."
            )
        super().__init__(_run_config(source, cfg))
        root = Path(cfg.out) if cfg.out else Path(cfg.run) / "finetune" / f"seed_{cfg.seed}"
        self.folder = RunFolder(root / "training", root / "checkpoints")
        self.settings["checkpoint_dir"] = self.folder.checkpoints
        self.loss.load_state_dict(source.loss.state_dict())
        self.loss.alpha = source.loss.alpha  # step control may have changed it
        if cfg.flow_updates:
            _start_from(self.loss, cfg.actor)
        self._collection: Generator[TensorDictBase, None, None] | None = None

    def read_data(self, replay_buffer: OfflineReplayBuffer | None = None) -> None:
        """Create the collector, the replay buffers and the trainer.

        Args:
            replay_buffer: the offline data. Defaults to ``None``: those of the trained run.

        Raises:
            FileExistsError: if the folder contains a fine-tuning already and ``resume`` is
                ``False``.
            ValueError: for a checkpoint of another fine-tuning.
        """
        cfg, choices = self.cfg, self.options
        try:
            check_run_folder(self.folder, cfg)
        except FileExistsError as error:
            raise FileExistsError(str(error).replace(", variant or log_dir", " or out")) from None
        except ValueError as error:
            product = "env_steps * updates_per_step"
            raise ValueError(str(error).replace("freeze_critics_at", product)) from None
        LOGGER.info(
            "POGO on %s, %d environment steps by actor %d, from update %d of %s; folder %s",
            cfg.task, choices.env_steps, choices.actor, self.source.trainer.collected_frames,
            choices.run, self.folder.root,
        )  # fmt: skip
        offline = self.source.replay_buffer if replay_buffer is None else replay_buffer
        settings = {
            "from": self.source.trainer.collected_frames,
            "actor": choices.actor,
            "updates_per_step": choices.updates_per_step,
            "exploration_noise": choices.exploration_noise,
            "flow_updates": choices.flow_updates,
        }
        self.buffer = OnlineBuffer(
            offline,
            self._steps(),
            capacity=choices.env_steps,
            batch_size=cfg.batch_size,
            updates_per_step=choices.updates_per_step,
        )
        self.make_trainer(offline, self.buffer, {**fingerprint(cfg, offline), "finetune": settings})
        self.trainer.optimization_stepper.hold_first_actor = bool(choices.flow_updates)
        self.trainer.register_module("online", self.buffer)
        self.resumed = self.trainer.resume() if cfg.resume else None

    def _steps(self) -> Iterator[TensorDictBase]:
        """New transitions, in a fresh episode where there is no environment yet."""
        while True:
            if self._collection is None:
                self._collection = self._collect()
            yield next(self._collection)

    def _collect(self) -> Generator[TensorDictBase, None, None]:
        cfg = self.cfg
        evaluator = self.evaluator
        if evaluator is not None and evaluator.eval_envs == 1:  # only one may be able to exist
            evaluator.close()
        collector = make_collector(
            env_fn(cfg.task, cfg.env),
            self.loss.actor(self.options.actor),
            self.replay_buffer,
            reward_shift=cfg.data.reward_shift,
            exploration_noise=self.options.exploration_noise,
            # Another seed after resuming: the start states should not repeat.
            seed=(cfg.seed + len(self.buffer.online)) % 2**31,
        )
        try:
            yield from collector
        finally:
            collector.shutdown()

    def _evaluations(self) -> list[Evaluation]:
        assert self.evaluator is not None
        if self.evaluator.eval_envs == 1:
            self._end_collection()
        return super()._evaluations()

    def _end_collection(self) -> None:
        if self._collection is not None:
            self._collection.close()
            self._collection = None

    def close(self) -> None:
        """Close the collector and the logger, and remove the files of a start that failed."""
        self._end_collection()
        super().close()


def _start_from(loss: POGOLoss, actor: int) -> None:
    """Start all actors, and their averages and target, from one of them, as it is deployed."""
    start = f"actor_network_{actor % loss.num_actors}"
    copies = ["actor_network_{}"]
    if loss.average_actors is not None:
        start = f"average_{start}"
        copies.append("average_actor_network_{}")
    names = [name.format(i) for name in copies for i in range(loss.num_actors)]
    if loss.delay_actor:
        names.append("target_actor_network_0")
    for name in names:
        if name != start:
            copy_weights(loss, start, name)


def _run_config(source: RunInProgress, cfg: DictConfig) -> DictConfig:
    """Options of the trained run, with those of its fine-tuning in place of its schedule."""
    found = copy.deepcopy(source.cfg)
    OmegaConf.set_struct(found, True)
    steps = cfg.env_steps * cfg.updates_per_step
    found.total_steps = steps + cfg.flow_updates
    for name in (
        "seed", "eval_interval", "eval_episodes", "log_interval", "checkpoint_interval", "resume",
        "device", "compile", "progress_bar",
    ):  # fmt: skip
        found[name] = cfg[name]
    # All networks are trained, with constant rates and step sizes.
    found.lr_schedule, found.lr_schedule_actor, found.lr_schedule_critic = "constant", None, None
    found.displacement, found.alpha_growth, found.freeze_critics_at = None, 1.0, None
    if cfg.flow_updates:
        found.freeze_critics_at = steps
        sizes = [cfg.step_size] * len(found.w2_weights)
        dim, alpha = source.spaces.action_dim, float(source.loss.alpha)
        weights = step_sizes_to_weights(sizes, dim, alpha)
        found.w2_weights = [found.w2_weights[0], *weights[1:]]  # actor 0 is not trained
        found.data_weight, found.return_temperature = 0.0, None
    found.save_model, found.checkpoint_dir = True, None
    return found


def finetune(arguments: Sequence[str]) -> list[Evaluation]:
    """Continue the training of a chain in an environment.

    Args:
        arguments: options of :class:`FinetuneConfig` as ``option=value`` or ``--option value``;
            for the run, its folder alone suffices.

    Returns:
        The last evaluation, one entry per actor and action mode.

    Raises:
        ValueError: for unknown options, invalid values, or a run without a checkpoint or an
            environment.
        OSError: if there is no run in the folder, or its files cannot be read or written.
    """
    cfg = parse_options(arguments, FinetuneConfig(), "run")
    if cfg.run is None:
        raise ValueError("run is missing: write pogo finetune FOLDER, with the folder of a run.")
    one = FineTuning(cfg)
    with (
        expendable_screen(),
        one.environments(),
        lock_run_folder(one.folder),
        deterministic(one.cfg.deterministic),
        log_to(ConsoleHandler()),
        closing(one),
    ):
        one.read_data()
        with one.opened():
            with stop_on_signals([one]):
                if one.resumed is None and one.evaluate is not None:
                    one.evaluate.evaluate_at(0)
                one.trainer.train()
            one.finish()
    return one.last


def main(arguments: Sequence[str]) -> None:
    """Run ``pogo finetune``; its exit codes are those of ``pogo train``.

    Args:
        arguments: options of :class:`FinetuneConfig`, see :func:`finetune`.
    """
    if wants_help(arguments):
        print(_HELP)
        print("\n".join(option_lines(options(FinetuneConfig))))
        return
    with exit_codes():
        finetune(arguments)


_HELP = """\
Continue the training of a chain in an environment, on offline and new data half and half.

  pogo finetune FOLDER [option=value ...]

Options:"""
