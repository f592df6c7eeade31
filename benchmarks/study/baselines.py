"""Baselines of the study: TorchRL's own losses on the same data, under the same evaluation.

    python benchmarks/study/baselines.py td3_bc task=hopper-medium-v2 data.source=hdf5 \
        data.path=hopper-medium.hdf5 seed=0 total_steps=20000 eval_interval=2500 folder=FOLDER

Methods, with the settings of their papers:

* ``bc``: behaviour cloning, mean squared error of a deterministic actor;
* ``td3_bc``: Fujimoto & Gu, *A Minimalist Approach to Offline Reinforcement Learning*, 2021,
  arXiv:2106.06860;
* ``iql``: Kostrikov et al., *Offline Reinforcement Learning with Implicit Q-Learning*, 2021,
  arXiv:2110.06169.

A run writes ``training/config.yaml``, ``training/evaluations.csv`` and ``training/metrics.csv``
below its folder, with the columns of ``pogo train``, and finally ``done.json``. It keeps no
checkpoints: a run that was interrupted starts over, a finished one is skipped.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchrl.data import Bounded
from torchrl.envs import RewardScaling
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor
from torchrl.objectives import BCLoss, IQLLoss, LossModule, SoftUpdate, TD3BCLoss

from pogo_torchrl import TransportActor, functional, make_qvalue
from pogo_torchrl.data import OfflineReplayBuffer, make_replay_buffer
from pogo_torchrl.evaluation import Evaluator
from pogo_torchrl.experiments.build import check_data, seed_everything
from pogo_torchrl.experiments.config import DataConfig, option
from pogo_torchrl.experiments.console import exit_with_error
from pogo_torchrl.experiments.csv_log import CSVSink
from pogo_torchrl.experiments.overrides import parse_options
from pogo_torchrl.experiments.run_folder import RunFolder, lock_run_folder
from pogo_torchrl.experiments.worker import stop_with_parent
from pogo_torchrl.export import on_raw_observations
from pogo_torchrl.files import atomic_write
from pogo_torchrl.modules import QValueOperator
from pogo_torchrl.trainers.hooks import Evaluation

HIDDEN_SIZES, TAU, GAMMA = (256, 256), 0.005, 0.99
ACTOR_INTERVAL = 2  # TD3: critic updates per update of the actor and of the targets


@dataclass
class Settings:
    """Options of a run."""

    method: str = option("td3_bc", "bc, td3_bc or iql")
    task: str = option("hopper-medium-v2", "D4RL task")
    seed: int = option(0, "seed", lowest=0)
    total_steps: int = option(20_000, "number of updates")
    eval_interval: int = option(2500, "updates between evaluations")
    eval_episodes: int = option(20, "episodes of an evaluation")
    batch_size: int = option(256, "transitions per update")
    lr: float = option(3e-4, "learning rate of all Adam optimizers")
    folder: str = option("logs/baseline", "folder of the run")
    worker: bool = option(False, "stop when stdin is closed, as it is when the study ends")
    data: DataConfig = field(default_factory=DataConfig)


@dataclass
class Method:
    """A method at the start of a run."""

    loss: LossModule
    """TorchRL's loss module, which holds the parameters."""
    mlp: nn.Module
    """The network f whose ``tanh f(s)`` is the deterministic action."""
    update: Callable[[TensorDict, int], None]
    """Makes one update on a batch, given the number of updates before it."""


def behaviour_cloning(observation_dim: int, spec: Bounded, cfg: DictConfig) -> Method:
    """Behaviour cloning with a deterministic actor."""
    mlp, actor = deterministic_actor(observation_dim, spec)
    loss = BCLoss(actor, loss_function="l2")
    optimizer = adam(loss.actor_network_params, cfg.lr)

    def update(batch: TensorDict, step: int) -> None:
        minimise(loss(batch)["loss_bc"], optimizer)

    return Method(loss, mlp, update)


def td3_bc(observation_dim: int, spec: Bounded, cfg: DictConfig) -> Method:
    """TD3+BC. The actor and all target networks move at every second update of the critics."""
    mlp, actor = deterministic_actor(observation_dim, spec)
    qvalue = make_qvalue(observation_dim, spec.shape[-1], HIDDEN_SIZES)
    loss = TD3BCLoss(
        actor,
        qvalue,
        action_spec=spec,
        alpha=2.5,
        policy_noise=0.2,
        noise_clip=0.5,
        loss_function="l2",  # the paper's; TorchRL's default is smooth_l1
    )
    loss.make_value_estimator(gamma=GAMMA)
    critic_optimizer = adam(loss.qvalue_network_params, cfg.lr)
    actor_optimizer = adam(loss.actor_network_params, cfg.lr)
    target_update = SoftUpdate(loss, tau=TAU)

    def update(batch: TensorDict, step: int) -> None:
        minimise(loss.qvalue_loss(batch)[0], critic_optimizer)
        if (step + 1) % ACTOR_INTERVAL == 0:
            minimise(loss.actor_loss(batch)[0], actor_optimizer)
            target_update.step()

    return Method(loss, mlp, update)


def iql(observation_dim: int, spec: Bounded, cfg: DictConfig) -> Method:
    """IQL with the paper's actor: a Gaussian with a tanh mean and a state-independent deviation."""
    mlp, action_dim = make_mlp(observation_dim, spec.shape[-1]), spec.shape[-1]
    scale = AddStateIndependentNormalScale(action_dim, scale_lb=math.exp(-5))
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(mlp, nn.Tanh(), scale), in_keys=["observation"], out_keys=["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        spec=spec,
        distribution_class=IndependentNormal,
        distribution_kwargs={"tanh_loc": False},
    )
    loss = IQLLoss(
        actor,
        make_qvalue(observation_dim, action_dim, HIDDEN_SIZES),
        QValueOperator(make_mlp(observation_dim, 1), in_keys=["observation"]),  # V(s)
        temperature=3.0,
        expectile=0.7,
        loss_function="l2",  # the paper's; TorchRL's default is smooth_l1
    )
    loss.make_value_estimator(gamma=GAMMA)
    actor_optimizer = adam(loss.actor_network_params, cfg.lr)
    optimizers = (
        actor_optimizer,
        adam(loss.qvalue_network_params, cfg.lr),
        adam(loss.value_network_params, cfg.lr),
    )
    schedule = CosineAnnealingLR(actor_optimizer, cfg.total_steps)
    target_update = SoftUpdate(loss, tau=TAU)

    def update(batch: TensorDict, step: int) -> None:
        losses = loss(batch)
        minimise(losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"], *optimizers)
        schedule.step()
        target_update.step()

    return Method(loss, mlp, update)


METHODS: dict[str, Callable[[int, Bounded, DictConfig], Method]] = {
    "bc": behaviour_cloning,
    "td3_bc": td3_bc,
    "iql": iql,
}


def make_mlp(observation_dim: int, outputs: int) -> MLP:
    return MLP(
        in_features=observation_dim,
        out_features=outputs,
        num_cells=HIDDEN_SIZES,
        activation_class=nn.ReLU,
    )


def deterministic_actor(observation_dim: int, spec: Bounded) -> tuple[MLP, TensorDictModule]:
    mlp = make_mlp(observation_dim, spec.shape[-1])
    net = nn.Sequential(mlp, nn.Tanh())
    return mlp, TensorDictModule(net, in_keys=["observation"], out_keys=["action"])


def adam(parameters: nn.Module, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(parameters.parameters(), lr, fused=True)


def minimise(loss: torch.Tensor, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


class IgnoreNoise(nn.Module):
    """A network f(s) as the network f(s, z) of a :class:`~pogo_torchrl.TransportActor`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, observation: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.net(observation)


def reward_scale(method: str, replay_buffer: OfflineReplayBuffer) -> float:
    """IQL scales locomotion rewards so that the returns in the data span 1000."""
    returns = replay_buffer.episode_returns
    span = float(returns.max() - returns.min())
    return 1000 / span if method == "iql" and span > 0 else 1.0


class Run:
    """One run of a method, ready to train.

    Args:
        cfg: a :class:`Settings`.

    Raises:
        ValueError: for settings or data that are not valid.
    """

    def __init__(self, cfg: DictConfig) -> None:
        if cfg.method not in METHODS:
            raise ValueError(f"method={cfg.method} is unknown; choose one of {', '.join(METHODS)}.")
        self.cfg = cfg
        self.evaluator = Evaluator(cfg.task, episodes=cfg.eval_episodes, seed=cfg.seed)
        self.spec = self.evaluator.action_spec
        if not bool((self.spec.space.low == -1).all() & (self.spec.space.high == 1).all()):
            raise ValueError(f"task={cfg.task} must have actions in [-1, 1], the range of tanh.")
        self.replay_buffer = make_replay_buffer(cfg.task, batch_size=cfg.batch_size, **cfg.data)
        check_data(self.replay_buffer, self.evaluator, cfg.data)
        self.reward_scale = reward_scale(cfg.method, self.replay_buffer)
        if self.reward_scale != 1.0:
            self.replay_buffer.append_transform(
                RewardScaling(loc=0.0, scale=self.reward_scale, in_keys=[("next", "reward")])
            )
        seed_everything(cfg.seed)
        self.method = METHODS[cfg.method](self.evaluator.observation_dim, self.spec, cfg)
        self.policy = on_raw_observations(
            TransportActor(IgnoreNoise(self.method.mlp), self.spec),
            *self.replay_buffer.normalization,
        )

    def train(self, folder: Path) -> None:
        """Train, evaluate at every interval and at the end, and write the files of the run."""
        cfg = self.cfg
        evaluations, metrics = (
            CSVSink(folder / f"{name}.csv") for name in ("evaluations", "metrics")
        )
        started = time.perf_counter()
        for step in range(1, cfg.total_steps + 1):
            batch = self.replay_buffer.sample()
            self.method.update(batch, step - 1)
            if step % cfg.eval_interval == 0 or step == cfg.total_steps:
                trained = time.perf_counter() - started
                metrics.write(step, [{**self.metrics(batch), "seconds": trained}])
                evaluation = self.evaluate()
                evaluations.write(step, [_row(evaluation)])
                print(f"{step}: score {evaluation.scores.mean():.1f}", flush=True)

    def evaluate(self) -> Evaluation:
        """Evaluate the deterministic policy on the episodes on which ``pogo train`` evaluates."""
        return next(e for e in self.evaluator([self.policy]) if e.mode == "deterministic")

    @torch.no_grad()
    def metrics(self, batch: TensorDict) -> dict[str, float]:
        """Displacement from the data and mean Q, in units of the data's rewards, on a batch."""
        action = self.method.mlp(batch["observation"]).tanh()
        found = {"data_mse_0": functional.l2_distance(action, batch["action"]).mean().item()}
        loss = self.method.loss
        if hasattr(loss, "qvalue_network"):
            with loss.qvalue_network_params[0].to_module(loss.qvalue_network):
                value = loss.qvalue_network(batch.select("observation", "action"))
            found["pred_value"] = value["state_action_value"].mean().item() / self.reward_scale
        return found


def _row(evaluation: Evaluation) -> dict[str, object]:
    return {
        "actor": evaluation.actor,
        "mode": evaluation.mode,
        "return_mean": float(evaluation.returns.mean()),
        "return_std": float(evaluation.returns.std()),
        "score": float(evaluation.scores.mean()),
        "episode_length": float(evaluation.lengths.mean()),
    }


def is_done(folder: Path, cfg: DictConfig) -> bool:
    """Whether the folder holds the finished run of these settings; the data may have moved."""
    try:
        done = json.loads((folder / "done.json").read_text())
        stored = OmegaConf.load(folder / "training" / "config.yaml")
    except (OSError, ValueError):
        return False
    wanted = {key: value for key, value in _settings(cfg).items() if key != "data"}
    return done == {"total_steps": cfg.total_steps} and wanted.items() <= dict(stored).items()


def _settings(cfg: DictConfig) -> dict[str, object]:
    """The settings that ``config.yaml`` records."""
    return {k: v for k, v in OmegaConf.to_container(cfg).items() if k not in ("folder", "worker")}


def train(cfg: DictConfig) -> None:
    """Train one baseline, unless its folder holds the finished run.

    Args:
        cfg: a :class:`Settings`.

    Raises:
        ValueError: for settings or data that are not valid.
        FileExistsError: if another process works on the folder.
    """
    root = Path(cfg.folder)
    folder = RunFolder(root / "training", root / "training")
    with lock_run_folder(folder):
        if is_done(root, cfg):
            print(f"{root} is done.")
            return
        folder.done.unlink(missing_ok=True)
        run = Run(cfg)
        with atomic_write(folder.training / "config.yaml", "x") as file:
            file.write(OmegaConf.to_yaml(_settings(cfg)))
        run.train(folder.training)
        with atomic_write(folder.done, "x") as file:  # last: it marks the run as complete
            json.dump({"total_steps": cfg.total_steps}, file)


def read_settings(arguments: Sequence[str]) -> DictConfig:
    """Parse the command line to a :class:`Settings`."""
    return parse_options(arguments, Settings(), "method")


def main(arguments: Sequence[str]) -> None:
    try:
        cfg = read_settings(arguments)
        if cfg.worker:
            stop_with_parent()
        train(cfg)
    except (ValueError, OSError, FloatingPointError) as error:
        exit_with_error(error)


if __name__ == "__main__":
    main(sys.argv[1:])
