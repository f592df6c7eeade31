"""Options, presets and config groups."""

from __future__ import annotations

import inspect
from functools import cache

import gymnasium
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from torchrl.data import Bounded

from pogo_torchrl import POGOLoss, POGOTrainer, configs, make_actor, make_qvalue
from pogo_torchrl.data import SOURCES
from pogo_torchrl.envs import max_episode_steps
from pogo_torchrl.experiments.config import RunConfig
from pogo_torchrl.functional import weights_to_step_sizes

PUBLISHED = {
    "halfcheetah-medium-v2": (0.01, 0.3),
    "halfcheetah-medium-replay-v2": (0.05, 0.1),
    "halfcheetah-medium-expert-v2": (0.4, 0.3),
    "hopper-medium-v2": (0.1, 0.5),
    "hopper-medium-replay-v2": (0.25, 0.1),
    "hopper-medium-expert-v2": (0.3, 0.2),
    "walker2d-medium-v2": (0.25, 0.2),
    "walker2d-medium-replay-v2": (0.1, 0.5),
    "walker2d-medium-expert-v2": (0.25, 0.3),
    "antmaze-umaze-v2": (0.5, 0.5),
    "antmaze-umaze-diverse-v2": (0.2, 0.5),
    "antmaze-medium-play-v2": (0.05, 0.3),
    "antmaze-medium-diverse-v2": (0.05, 0.3),
    "antmaze-large-play-v2": (0.01, 0.3),
    "antmaze-large-diverse-v2": (0.05, 0.3),
}


def composed(*overrides):
    with initialize_config_module("pogo_torchrl.experiments.conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))


def test_all_fifteen_tasks_have_presets():
    assert configs.tasks() == sorted(PUBLISHED)


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_original_repeats_the_second_published_weight(task):
    cfg = configs.compose([f"task={task}", "algorithm=original"])
    first, second = PUBLISHED[task]
    assert (cfg.task, cfg.algorithm) == (task, "pogo")
    assert list(cfg.w2_weights) == [first, second, second]
    defaults = RunConfig()
    assert all(cfg[key] == getattr(defaults, key) for key in TUNED - {"w2_weights"})


def test_the_original_needs_weights_where_none_are_published():
    given = ["task=hopper-expert-v2", "algorithm=original"]
    with pytest.raises(Exception, match="no weights are published for task=hopper-expert-v2"):
        _ = configs.compose(given).w2_weights
    assert configs.compose([*given, "w2_weights=[1,2]"]).w2_weights == [1, 2]


# Options that presets of tasks set for POGO.
TUNED = {
    "w2_weights", "alpha", "data_weight", "return_temperature", "actor_q", "average_actors",
    "freeze_critics_at", "tau",
}  # fmt: skip


@cache
def local_settings(task):
    return configs.compose([f"task={task}"])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("task", PUBLISHED)
def test_all_tasks_have_one_setting_but_the_local_data(task, source):
    cfg = configs.compose([f"task={task}", f"data.source={source}"])
    antmaze = task.startswith("antmaze")
    assert (cfg.lr, cfg.eval_episodes) == ((1e-4, 100) if antmaze else (3e-4, 10))
    assert cfg.data.reward_shift == (-1 if antmaze else 0)
    assert cfg.data.normalize
    if (task, source) != ("hopper-medium-v2", "local"):
        reference = local_settings("walker2d-medium-v2")
        assert {key: cfg[key] for key in TUNED} == {key: reference[key] for key in TUNED}
        assert cfg.return_temperature == 0.1
    # Nothing else depends on the source.
    local = local_settings(task)
    differ = {key for key in cfg if cfg[key] != local[key]}
    assert differ <= {"data", *TUNED}
    assert configs.compose([f"task={task}", f"data.source={source}", "alpha=2"]).alpha == 2


def test_any_task_can_have_the_setting_of_the_presets():
    preset = local_settings("walker2d-medium-v2")
    for given in (["task=mine", "env.id=Pendulum-v1"], ["task=hopper-medium-v2"]):
        cfg = configs.compose([*given, "algorithm=returns"])
        assert cfg.algorithm == "pogo"
        assert {key: cfg[key] for key in TUNED} == {key: preset[key] for key in TUNED}


@pytest.mark.parametrize("algorithm", ["iql", "paper", "rebrac", "td3_bc"])
@pytest.mark.parametrize("task", ["hopper-medium-v2", "walker2d-medium-v2"])
def test_presets_of_algorithms_reset_what_those_of_tasks_set(task, algorithm):
    cfg = configs.compose([f"task={task}", f"algorithm={algorithm}"])
    other = configs.compose(["task=hopper-expert-v2", f"algorithm={algorithm}"])  # has no preset
    assert {key: cfg[key] for key in TUNED} == {key: other[key] for key in TUNED}
    defaults = RunConfig()
    for key in TUNED - {"w2_weights", "freeze_critics_at"}:
        assert cfg[key] == getattr(defaults, key)


def test_the_default_run_takes_small_steps():
    cfg = configs.compose([])
    found = weights_to_step_sizes(list(cfg.w2_weights), action_dim=3, alpha=cfg.alpha)
    assert found == pytest.approx((0.02, 0.07, 0.07), rel=0.01)
    assert 0 < cfg.freeze_critics_at < cfg.total_steps


@pytest.mark.parametrize("task", PUBLISHED)
def test_presets_set_the_environment_and_horizon_of_the_task(task):
    env = composed(f"task={task}").env
    assert gymnasium.spec(env.id).max_episode_steps == env.max_episode_steps
    assert env.id == f"pogo_torchrl/{task}"
    assert env.max_episode_steps == max_episode_steps(task)


def test_command_line_overrides_presets():
    cfg = composed("task=hopper-medium-v2", "w2_weights=[1,2]", "data.source=hdf5", "lr=1e-4")
    assert (list(cfg.w2_weights), cfg.data.source, cfg.lr) == ([1.0, 2.0], "hdf5", 1e-4)


@pytest.mark.parametrize(
    ("override", "named"),
    [("total_steps=many", "total_steps"), ("resume=perhaps", "resume"), ("w2_weights=[a]", "w2")],
)
def test_wrong_types_are_rejected_naming_the_key(override, named):
    with pytest.raises(Exception, match=named) as error:
        composed(override)
    assert named in f"{error.value} {error.value.__cause__}"


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("total_step=1", "total_steps"),
        ("data.sorce=hdf5", "data.source"),
        ("logger=wandb", "logger.backend"),
        ("task=hoper-medium", "hopper-medium-v2"),
        ("task=antmaze-large", "antmaze-large-play-v2"),
        ("env.backened=d4rl", "env.backend"),
    ],
)
def test_typos_give_suggestions(argument, answer):
    with pytest.raises(ValueError, match=answer):
        configs.check_overrides([argument])


def test_known_options_and_hydra_flags_are_accepted():
    configs.check_overrides(
        ["--help", "seed=1", "data.path=x", "hydra.verbose=true", "task=hopper-medium-v2"]
    )


def test_defaults_equal_those_of_the_loss():
    signature = inspect.signature(POGOLoss.__init__).parameters
    for schema in (configs.RunConfig(), configs.POGOLossConfig()):
        for name, parameter in signature.items():
            if name == "w2_backend" and isinstance(schema, configs.RunConfig):
                continue  # the command line defaults to the fast backend
            if hasattr(schema, name) and parameter.default is not inspect.Parameter.empty:
                default = parameter.default
                expected = list(default) if isinstance(default, tuple) else default
                assert getattr(schema, name) == expected, name


def test_pogo_is_registered_in_torchrl_s_groups():
    store = ConfigStore.instance().repo
    assert "pogo.yaml" in store["loss"]
    assert (
        "td3_bc.yaml" in store["loss"] or "td3.yaml" in store["loss"]
    )  # TorchRL's own are still there
    assert "pogo.yaml" in store["trainer"]


def test_group_configs_instantiate(make_buffer):
    spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
    loss = instantiate(
        configs.POGOLossConfig(w2_weights=[0.1, 0.2]),
        actor_network=make_actor(3, spec, (8,)),
        qvalue_network=make_qvalue(3, 2, (8,)),
    )
    assert isinstance(loss, POGOLoss)
    assert loss.num_actors == 2
    trainer = instantiate(
        configs.POGOTrainerConfig(total_steps=2, progress_bar=False),
        loss_module=loss,
        replay_buffer=make_buffer(),
    )
    assert isinstance(trainer, POGOTrainer)
    trainer.train()
    assert trainer.collected_frames == 2


def test_help_lists_all_sources():
    assert all(source in configs.options()["data.source"] for source in SOURCES)
