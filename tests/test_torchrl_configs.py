"""Trainings composed from YAML files and the command line by TorchRL's Hydra config groups."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tensordict import assert_close

from pogo_torchrl import POGOTrainer, configs, make_qvalue
from pogo_torchrl.data import make_replay_buffer
from pogo_torchrl.experiments.torchrl_builders import make_pogo_trainer, make_transport_actor
from pogo_torchrl.modules import make_transport_net

PAGE = (Path(__file__).parents[1] / "docs" / "hydra.md").read_text()
YAML, SCRIPT = (
    re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[1] for language in ("yaml", "python")
)
SMALL = [
    "replay_buffer.size=1000",
    "replay_buffer.batch_size=16",
    "network.hidden_sizes=[8]",
    "models.qvalue.hidden_sizes=[8]",
    "trainer.total_steps=4",
    "trainer.log_interval=2",
    "trainer.progress_bar=false",
]


@pytest.fixture
def recipe(tmp_path):
    """Folder with the files of the documentation."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.yaml").write_text(YAML)
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


@pytest.fixture
def trainer_of(recipe, monkeypatch):
    """Factory of trainers: from the documented file with overrides, or from another config."""
    monkeypatch.chdir(recipe)

    def make(*overrides: str, config: dict | None = None) -> POGOTrainer:
        if config is not None:
            OmegaConf.save(OmegaConf.create(config), recipe / "config" / "config.yaml")
        with initialize_config_dir(str(recipe / "config"), version_base="1.3"):
            cfg = compose("config", overrides=[*SMALL, *overrides] if config is None else overrides)
        return instantiate(cfg.trainer)

    return make


def minimal(*groups: str, trainer: dict | None = None, **nodes) -> dict:
    """A config with a partial loss that sets nothing optional, nor bounds."""
    chosen = {"replay_buffer": "pogo_data", "model@actor": "transport_actor", "loss": "pogo"}
    chosen |= {"model@qvalue": "pogo_qvalue", "trainer": "pogo"}
    chosen |= dict(group.split(": ") for group in groups)
    found = {
        "defaults": [*({group: name} for group, name in chosen.items()), "_self_"],
        "replay_buffer": {"size": 1000, "batch_size": 16},
        "loss": {"_partial_": True},
        "trainer": {
            "replay_buffer": "${replay_buffer}",
            "loss_module": "${loss}",
            "actor_network": "${actor}",
            "qvalue_network": "${qvalue}",
            "total_steps": 2,
            "progress_bar": False,
            **(trainer or {}),
        },
    }
    return found | nodes


def parameters(loss) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in loss.named_parameters()}


def trained(trainer) -> bool:
    """Train, and return whether all parameters moved and are finite."""
    before = parameters(trainer.loss_module)
    trainer.train()
    after = parameters(trainer.loss_module)
    return all(not torch.equal(before[k], v) and v.isfinite().all() for k, v in after.items())


def test_a_script_and_a_yaml_file_train_from_the_command_line(recipe):
    command = [sys.executable, "train.py", *SMALL, "optimizer=adamw", "loss.w2_weights=[0.1,0.5]"]
    done = subprocess.run(
        command, cwd=recipe, capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    rows = (recipe / "logs").rglob("*loss_qvalue.csv")
    steps = [line.split(",")[0] for line in next(rows).read_text().splitlines()]
    assert steps[-2:] == ["2", "4"]
    state = torch.load(
        next((recipe / "checkpoints" / "step-000000000004").rglob("*loss_module/state.pt")),
        weights_only=True,
    )
    chain = {re.search(r"actor_network_(\d)", str(key)) for key in state}
    assert {found[1] for found in chain if found} == {"0", "1"}


def test_the_trainer_has_the_settings_of_the_yaml_file(trainer_of):
    trainer = trainer_of()
    loss, optimizers = trainer.loss_module, trainer.optimization_stepper.optimizers
    assert float(loss.value_estimator.gamma) == pytest.approx(0.99)
    assert loss.actor(0).module.mlp[0].in_features == 11 + 3
    assert loss.actor(0).module.mlp[0].out_features == 8
    assert torch.equal(loss.max_action, torch.ones(3))
    assert {type(one) for one in optimizers.values()} == {torch.optim.Adam}
    group = optimizers["actor_2"].param_groups[0]
    assert (group["lr"], group["eps"], tuple(group["betas"])) == (3e-4, 1e-8, (0.9, 0.999))
    assert trainer.optimization_stepper.clip_grad_norm == 10
    assert trained(trainer)


def test_the_seed_determines_networks_and_training(trainer_of):
    first, same, other = (trainer_of(f"trainer.seed={seed}").loss_module for seed in (1, 1, 2))
    initial = parameters(first)
    assert all(torch.equal(v, initial[k]) for k, v in parameters(same).items())
    assert any(not torch.equal(v, initial[k]) for k, v in parameters(other).items())


@pytest.mark.parametrize(
    ("nodes", "low"),
    [
        ({"actor": {"low": [-2, -1, -1], "high": 1}}, -2),
        ({"loss": {"_partial_": True, "bounds": [-3, 1]}}, -3),
    ],
)
def test_bounds_are_those_of_the_actor_or_of_the_loss(trainer_of, nodes, low):
    trainer = trainer_of(config=minimal(**nodes))
    assert trainer.loss_module.min_action.reshape(-1)[0] == low
    assert trainer.loss_module.actor(0).action_spec.space.low[0] == low
    assert trained(trainer)


BOUNDED = {"actor": {"low": -1, "high": 1}}


def test_hard_updates_replace_the_soft_ones(trainer_of):
    updater = {"target_net_updater": "${target_net_updater}"}
    interval = {"target_net_updater": {"value_network_update_interval": 1}}
    config = minimal("target_net_updater: hard", trainer=updater, **BOUNDED, **interval)
    trainer = trainer_of(config=config)
    trainer.train()
    loss = trainer.loss_module
    assert_close(loss.target_qvalue_network_params, loss.qvalue_network_params.data)


def test_a_loss_that_is_not_partial_contains_its_networks(trainer_of):
    sizes = {"observation_dim": 11, "action_dim": 3}
    config = minimal(
        "network@actor.network: mlp",
        "model@qvalue: value",
        "network@qvalue.network: mlp",
        actor={**sizes, "low": -1, "high": 1, "network": {"in_features": 14, "out_features": 3}},
        qvalue={
            "in_keys": ["observation", "action"],
            "out_keys": ["state_action_value"],
            "network": {"in_features": 14, "out_features": 1},
        },
        loss={"actor_network": "${actor}", "qvalue_network": "${qvalue}", "gamma": 0.5},
    )
    del config["trainer"]["actor_network"], config["trainer"]["qvalue_network"]
    trainer = trainer_of(config=config)
    assert float(trainer.loss_module.value_estimator.gamma) == 0.5
    assert trained(trainer)


def test_an_actor_of_torchrl_is_bounded_by_the_environment(trainer_of):
    config = minimal(
        "model@actor: tanh_normal",
        "network@actor.network: mlp",
        actor={
            "in_keys": ["observation"],
            "param_keys": ["loc", "scale"],
            "out_keys": ["action"],
            "network": {"in_features": 11, "out_features": 6},
        },
        env={"_target_": "pogo_torchrl.envs.make_env", "task": "hopper-medium-v2"},
        trainer={"create_env_fn": {"_target_": "torchrl.envs.GymWrapper", "env": "${env}"}},
    )
    trainer = trainer_of(config=config)
    assert torch.equal(trainer.loss_module.max_action, torch.ones(3))
    assert trained(trainer)


def test_torchrls_td3_trainer_trains_every_actor_of_the_chain(trainer_of):
    sizes = {"observation_dim": 3, "action_dim": 1}
    config = minimal(
        "trainer: td3",
        "env: gym",
        "collector: sync",
        "replay_buffer: tensordict",
        "storage@replay_buffer.storage: lazy_tensor",
        "sampler@replay_buffer.sampler: random",
        "writer@replay_buffer.writer: round_robin",
        "target_net_updater: soft",
        "optimizer: adam",
        env={"env_name": "Pendulum-v1", "_partial_": True},
        actor={**sizes, "low": -2, "high": 2},
        qvalue=sizes,
        replay_buffer={"batch_size": 8, "storage": {"max_size": 100}},
        collector={
            "create_env_fn": "${env}",
            "total_frames": 20,
            "frames_per_batch": 10,
            "_partial_": True,
        },
        trainer={
            "collector": "${collector}",
            "total_frames": 20,
            "optim_steps_per_batch": 2,
            "optimizer": "${optimizer}",
            "target_net_updater": "${target_net_updater}",
            "logger": None,
            "save_trainer_file": None,
        },
    )
    del config["trainer"]["total_steps"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchRL: its trainer is a prototype
        trainer = trainer_of(config=config)
        assert trained(trainer)
    assert trainer.loss_module.num_actors == 3


@pytest.mark.parametrize(
    ("clip_grad_norm", "clip_norm", "expected"),
    [(True, None, None), (False, None, None), (True, 2.0, 2.0), (None, 2.0, 2.0), (3.0, None, 3.0)],
)
def test_gradients_are_clipped_as_in_torchrl(trainer_of, clip_grad_norm, clip_norm, expected):
    clipping = {"clip_grad_norm": clip_grad_norm, "clip_norm": clip_norm}
    trainer = trainer_of(config=minimal(trainer=clipping, **BOUNDED))
    assert trainer.optimization_stepper.clip_grad_norm == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (minimal(), "set low and high, or trainer.create_env_fn"),
        (minimal(actor={"low": -1}), "low=-1 and high=None: set both"),
        (minimal("replay_buffer: tensordict", replay_buffer={"batch_size": 4}), "is empty"),
        (minimal(loss={}), "loss: pogo has no actor_network"),
        (
            minimal(trainer={"clip_grad_norm": False, "clip_norm": 1.0}, **BOUNDED),
            "clip_grad_norm=False and clip_norm=1.0",
        ),
        (
            minimal(loss={"actor_network": {"_target_": "torch.nn.Linear", "in_features": 1,
                                            "out_features": 1}}),
            "loss: pogo has no qvalue_network",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(trainer_of, config, message):
    with pytest.raises(Exception, match=re.escape(message)):
        trainer_of(config=config)


def test_numbers_as_bounds_need_the_size_of_the_action():
    with pytest.raises(ValueError, match="low=-1 and high=2 do not tell the size of the action"):
        make_transport_actor(observation_dim=3, low=-1, high=2)


@pytest.mark.parametrize(
    ("config", "builds"),
    [
        (configs.POGOTrainerConfig(), POGOTrainer.__init__),
        (configs.POGOTrainerConfig(), make_pogo_trainer),
        (configs.POGODataConfig(), make_replay_buffer),
        (configs.TransportNetConfig(), make_transport_net),
        (configs.TransportActorConfig(), make_transport_actor),
        (configs.QValueConfig(), make_qvalue),
    ],
)
def test_configs_have_every_argument_with_its_default(config, builds):
    for name, parameter in inspect.signature(builds).parameters.items():
        if name == "self" or parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        ours = getattr(config, name)
        if parameter.default is not inspect.Parameter.empty and name != "hooks":
            default = parameter.default
            assert ours == (list(default) if isinstance(default, tuple) else default), name
