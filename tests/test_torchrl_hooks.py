"""Every hook that TorchRL ships either runs with POGOTrainer, or is refused when registered."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import warnings

import numpy as np
import pytest
import torch
import torchrl.trainers
from tensordict.nn import TensorDictModule
from torch.optim.lr_scheduler import StepLR
from torch.testing import assert_close
from torchrl.data import (
    LazyTensorStorage,
    OfflineToOnlineReplayBuffer,
    ReplayBufferEnsemble,
    TensorDictReplayBuffer,
)
from torchrl.envs import GymEnv, TransformedEnv
from torchrl.modules import TanhModule
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger
from torchrl.trainers import (
    BatchSubSampler,
    ClearCudaCache,
    CountFramesLog,
    EarlyStopping,
    LogScalar,
    LogTiming,
    LogValidationReward,
    LRSchedulerHook,
    OptimizerHook,
    ReplayBufferTrainer,
    RewardNormalizer,
    SelectKeys,
    TargetNetUpdaterHook,
    TrainerHookBase,
    UpdateWeights,
    UTDRHook,
    ValueEstimatorHook,
)
from torchrl.trainers.algorithms.offline_to_online import (
    OfflineToOnlineAnnealHook,
    OfflineToOnlineReplayBufferHook,
)
from torchrl.trainers.trainers import OptimizationStepper

from pogo_torchrl import POGOTrainer

REWARD, TOTAL = ("next", "reward"), 60
NEEDED = ("observation", "action", ("next", "observation"), REWARD, ("next", "terminated"))


def shipped_hooks() -> dict[str, type]:
    """All hooks of the installed TorchRL by name, except abstract and private ones."""
    for module in pkgutil.walk_packages(torchrl.trainers.__path__, "torchrl.trainers."):
        try:
            importlib.import_module(module.name)
        except ImportError:
            continue  # it needs a package that is not installed
    found, todo = {}, [TrainerHookBase]
    while todo:
        for kind in todo.pop().__subclasses__():
            todo.append(kind)
            if kind.__module__.startswith("torchrl.") and kind is not OptimizationStepper:
                found[kind.__name__] = kind
    return found


def make_trainer(make_loss, make_buffer, total=TOTAL, **settings):
    return POGOTrainer(make_loss(), make_buffer(), total, progress_bar=False, **settings)


def optimizer_of(trainer):
    return trainer.optimization_stepper.optimizers["qvalue"]


def logged(trainer, name):
    return trainer._log_dict[name]


# --------------------------------------------------------------------------- hooks that run
# Each function registers the hook with a trainer as TorchRL's users do, and returns a check of its
# effect after the training. The rewards of the data are 2 everywhere, except in one test.


def batch_sub_sampler(trainer):
    BatchSubSampler(batch_size=5).register(trainer)
    sizes = []
    trainer.register_op("post_optim_log", lambda batch: sizes.append(batch.numel()))
    return lambda: sizes == TOTAL * [5]


def clear_cuda_cache(trainer):
    hook = ClearCudaCache(interval=2)
    hook.register(trainer)
    return lambda: hook.count == 3  # 60 updates in ticks of 25


def count_frames(trainer):
    CountFramesLog(frame_skip=1).register(trainer)
    return lambda: logged(trainer, "n_frames") == [25, 50, 60]


def early_stopping(trainer):
    LogScalar(REWARD, "r_training").register(trainer)
    EarlyStopping(monitor="r_training", patience=25, wait_for=0).register(trainer)
    return lambda: trainer.collected_frames == 50 and "r_training" in trainer.stop_reason


def log_scalar(trainer):
    LogScalar(REWARD, "r_training").register(trainer)
    LogScalar(REWARD, "r_max", reduction="max", include_std=False).register(trainer)
    return lambda: (
        logged(trainer, "r_training") == logged(trainer, "r_max") == [2.0, 2.0, 2.0]
        and logged(trainer, "r_training_std") == [0.0, 0.0, 0.0]
    )


def log_timing(trainer):
    LogTiming().register(trainer)
    return lambda: any(name.startswith("time/hook") for name in trainer._log_dict)


def log_validation_reward(trainer):
    env = TransformedEnv(GymEnv("Pendulum-v1"))
    policy = TensorDictModule(torch.nn.Linear(3, 1), ["observation"], ["raw"])
    policy = torch.nn.Sequential(policy, TanhModule(in_keys=["raw"], out_keys=["action"]))
    LogValidationReward(
        record_interval=2, record_frames=5, environment=env, policy_exploration=policy
    ).register(trainer)
    return lambda: (
        len(logged(trainer, "r_evaluation")) == 2 and max(logged(trainer, "r_evaluation")) < 0
    )


def lr_scheduler(trainer):
    optimizer = optimizer_of(trainer)
    LRSchedulerHook(StepLR(optimizer, 20, gamma=0.5), "optim").register(trainer)
    return lambda: optimizer.param_groups[0]["lr"] == 3e-4 / 8


def reward_normalizer(trainer):
    RewardNormalizer(scale=3.0).register(trainer)
    trainer.dataset[:][REWARD][::2] = 0.0  # mean 1, standard deviation 1
    seen = []
    trainer.register_op("post_optim_log", lambda batch: seen.append(batch[REWARD]))
    return lambda: 2 < torch.cat(seen).std() < 4 and torch.cat(seen).mean().abs() < 1


def target_net_updater(trainer):
    other = copy.deepcopy(trainer.loss_module)
    other.qvalue_network_params.data.apply_(lambda p: p.fill_(1.0))
    TargetNetUpdaterHook(SoftUpdate(other, tau=1.0)).register(trainer, "other")
    return lambda: all(
        (p == 1).all() for p in other.target_qvalue_network_params.values(True, True)
    )


def update_weights(trainer):
    class Sender:
        count = 0

        def update_weights(self):
            self.count += 1

    every_tick, every_ten = Sender(), Sender()
    UpdateWeights(trainer.collector).register(trainer)  # nothing collects: does nothing
    UpdateWeights(sender=every_tick).register(trainer, "ticks")
    UpdateWeights(
        sender=every_ten, update_weights_interval=10, interval_unit="optim_steps", trainer=trainer
    ).register(trainer, "updates")
    return lambda: (every_tick.count, every_ten.count) == (3, 6)


RUN = {
    "BatchSubSampler": batch_sub_sampler,
    "ClearCudaCache": clear_cuda_cache,
    "CountFramesLog": count_frames,
    "EarlyStopping": early_stopping,
    "LRSchedulerHook": lr_scheduler,
    "LogScalar": log_scalar,
    "LogTiming": log_timing,
    "LogValidationReward": log_validation_reward,
    "RewardNormalizer": reward_normalizer,
    "TargetNetUpdaterHook": target_net_updater,
    "UpdateWeights": update_weights,
}

# --------------------------------------------------------------------------- refused hooks
# Each function creates the hook; the text is part of the message.


def empty_buffer():
    return TensorDictReplayBuffer(storage=LazyTensorStorage(8), batch_size=4)


def offline_to_online(trainer):
    return OfflineToOnlineReplayBuffer(trainer.dataset, online_capacity=8, batch_size=4)


def optimizer_hook(trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return OptimizerHook(optimizer_of(trainer))


def stepper(kind):
    """A stepper of TorchRL; the arguments of its constructor do not matter here."""
    return lambda trainer: kind.__new__(kind)


REFUSED = {
    "OfflineToOnlineAnnealHook": (
        lambda trainer: OfflineToOnlineAnnealHook(trainer, offline_to_online(trainer), 9),
        "train on buffer.offline_buffer",
    ),
    "OfflineToOnlineReplayBufferHook": (
        lambda trainer: OfflineToOnlineReplayBufferHook(offline_to_online(trainer)),
        "e.g. buffer.offline_buffer",
    ),
    "OptimizerHook": (optimizer_hook, "give POGOTrainer the optimizers"),
    "ReplayBufferTrainer": (
        lambda trainer: ReplayBufferTrainer(empty_buffer()),
        "give it to POGOTrainer(loss, replay_buffer, ...)",
    ),
    "SelectKeys": (
        lambda trainer: SelectKeys(["action"]),
        "trainer.register_op('process_optim_batch', hook)",
    ),
    "UTDRHook": (UTDRHook, "CountFramesLog logs the number of updates"),
    "ValueEstimatorHook": (
        lambda trainer: ValueEstimatorHook(lambda batch: batch),
        "loss.make_value_estimator(...)",
    ),
    **{
        name: (stepper(kind), "choose qvalue_optimizer, actor_optimizer, clip_grad_norm and bf16")
        for name, kind in shipped_hooks().items()
        if issubclass(kind, OptimizationStepper)
    },
}


@pytest.mark.parametrize("name", sorted(shipped_hooks()))
def test_a_hook_of_torchrl_runs_or_is_refused(make_loss, make_batch, name):
    assert (name in RUN) != (name in REFUSED), f"TorchRL has the new hook {name}: add it here"
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(64), batch_size=16)
    buffer.extend(make_batch(64).set(REWARD, torch.full((64, 1), 2.0)))
    trainer = POGOTrainer(make_loss(), buffer, TOTAL, progress_bar=False)
    if name in RUN:
        has_effect = RUN[name](trainer)
        trainer.train()
        assert has_effect()
        return
    make, text = REFUSED[name]
    before = dict(trainer._modules), copy.copy(trainer.stages)
    hook = make(trainer)
    with pytest.raises(ValueError, match=r"POGOTrainer|data are|POGOLoss") as error:
        hook.register(trainer)
    assert text in str(error.value)
    assert (trainer._modules, trainer.stages) == before


def test_the_table_has_no_hooks_that_torchrl_lacks():
    missing = {*RUN, *REFUSED} - set(shipped_hooks())
    if missing:
        pytest.skip(f"this TorchRL has no {', '.join(sorted(missing))}")


# --------------------------------------------------------------------------- conditions


def test_hooks_cannot_be_registered_under_another_name_of_register_op(make_loss, make_buffer):
    trainer = make_trainer(make_loss, make_buffer)
    with pytest.raises(ValueError, match="POGOTrainer has no 'optimizer' stage"):
        trainer.register_hook("optimizer", optimizer_hook(trainer))
    buffer = ReplayBufferTrainer(empty_buffer())
    with pytest.raises(ValueError, match="ReplayBufferTrainer cannot be registered"):
        trainer.register_op("process_optim_batch", buffer.sample)


def test_a_scheduler_of_another_optimizer_is_refused(make_loss, make_buffer):
    trainer = make_trainer(make_loss, make_buffer)
    other = torch.optim.Adam(trainer.loss_module.qvalue_params())
    hook = LRSchedulerHook(StepLR(other, 1))
    with pytest.raises(ValueError, match=r"LRSchedulerHook .* optimizer that POGOTrainer does not"):
        hook.register(trainer)
    loss = make_loss()
    own = torch.optim.Adam(loss.qvalue_params())
    POGOTrainer(
        loss, make_buffer(), 3, qvalue_optimizer=own, hooks=[LRSchedulerHook(StepLR(own, 1))],
        progress_bar=False,
    ).train()  # fmt: skip
    assert_close(own.param_groups[0]["lr"], 1e-4)  # one tick


def test_a_second_updater_of_the_targets_is_refused(make_loss, make_buffer):
    trainer = make_trainer(make_loss, make_buffer)
    hook = TargetNetUpdaterHook(SoftUpdate(trainer.loss_module, tau=0.1))
    with pytest.raises(ValueError, match=r"target_net_updater=updater"):
        trainer.register_op("post_optim", hook)


def test_keys_can_be_selected_in_sampled_batches(make_loss, make_buffer):
    trainer, seen = make_trainer(make_loss, make_buffer, 3), []
    rows = trainer.dataset[:].clone().set("unused", torch.zeros(64))
    trainer.dataset = TensorDictReplayBuffer(storage=LazyTensorStorage(64), batch_size=16)
    trainer.dataset.extend(rows)
    trainer.register_op("process_optim_batch", SelectKeys(NEEDED))
    trainer.register_op("post_optim_log", lambda batch: seen.append("unused" in batch))
    trainer.train()
    assert seen == 3 * [False]


def test_early_stopping_monitors_losses(make_loss, make_buffer):
    trainer = make_trainer(make_loss, make_buffer)
    hook = EarlyStopping(monitor="loss_qvalue", min_delta=1e9, patience=0, wait_for=0)
    hook.register(trainer)
    trainer.train()
    assert trainer.collected_frames == 50


def test_hooks_that_look_at_the_batch_do_not_affect_training(make_loss, make_buffer):
    loss, buffer, states = make_loss(), make_buffer(), []
    for watched in (False, True):
        trainer = POGOTrainer(copy.deepcopy(loss), buffer, 30, progress_bar=False)
        if watched:
            LogScalar(REWARD, "reward").register(trainer)
        torch.manual_seed(1)
        trainer.train()
        states.append(dict(trainer.loss_module.state_dict()))
    assert_close(*states, rtol=0, atol=0)
    assert trainer.optimization_stepper.steps == 30


@pytest.mark.parametrize("stage", ["batch_process", "pre_epoch", "pre_steps_log", "post_steps_log"])
def test_hooks_see_rows_of_the_dataset(make_loss, make_buffer, stage):
    trainer, seen = make_trainer(make_loss, make_buffer), []
    trainer.register_op(stage, seen.append)
    trainer.train()
    assert [batch.numel() for batch in seen] == [25, 25, 10]
    rewards = {float(r) for r in trainer.dataset[:][REWARD]}
    found = [float(r) for batch in seen for r in batch[REWARD]]
    assert rewards >= set(found)
    assert len(set(found)) > 20


def test_hooks_see_rows_of_trajectories(make_loss, make_batch):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(64, ndim=2), batch_size=16)
    buffer.extend(make_batch(4, 16))
    trainer, seen = POGOTrainer(make_loss(), buffer, 30, progress_bar=False), []
    trainer.register_op("pre_steps_log", lambda batch: seen.append(batch.shape))
    trainer.train()
    assert seen == [(25,), (5,)]


def test_hooks_see_rows_of_several_buffers(make_loss, make_buffer):
    parts = make_buffer(8), make_buffer(24)
    buffers = {
        "ensemble": ReplayBufferEnsemble(*parts, batch_size=16),
        "offline": OfflineToOnlineReplayBuffer(parts[0], online_capacity=24, batch_size=16),
    }
    for name, buffer in buffers.items():
        trainer, seen = POGOTrainer(make_loss(), buffer, 50, progress_bar=False), []
        if name == "offline":
            buffer.extend(parts[1][:])
        trainer.register_op("pre_steps_log", lambda batch, seen=seen: seen.append(batch[REWARD]))
        trainer.train()
        assert [len(rewards) for rewards in seen] == [25, 25]
        found = {float(reward) for reward in torch.cat(seen)}
        for part in parts:
            assert found & {float(reward) for reward in part[:][REWARD]}


def test_hooks_that_look_at_rows_need_a_buffer_that_gives_them(make_loss, make_buffer):
    class Samples:
        data = make_buffer()

        def __len__(self):
            return 64

        def sample(self):
            return self.data.sample()

    POGOTrainer(make_loss(), Samples(), 2, progress_bar=False).train()
    trainer = POGOTrainer(make_loss(), Samples(), 2, progress_bar=False)
    LogScalar(REWARD, "reward").register(trainer)
    with pytest.raises(ValueError, match="looks at rows of the data, which Samples does not give"):
        trainer.train()


def test_changing_the_batch_size_of_a_tick_is_an_error(make_loss, make_buffer):
    trainer = make_trainer(make_loss, make_buffer)
    trainer.register_op("batch_process", BatchSubSampler(batch_size=5))
    with pytest.raises(ValueError, match=r"register it at 'process_optim_batch'"):
        trainer.train()


def test_resumed_hooks_continue(make_loss, make_buffer, tmp_path):
    buffer, rates, frames = make_buffer(), [], []
    for total in (30, 60):
        trainer = POGOTrainer(
            make_loss(), buffer, total, progress_bar=False, checkpoint_dir=tmp_path
        )
        LRSchedulerHook(StepLR(optimizer_of(trainer), 20, gamma=0.5), "optim").register(trainer)
        count = CountFramesLog(frame_skip=1)
        count.register(trainer)
        RewardNormalizer().register(trainer)
        trainer.resume()
        trainer.train()
        rates.append(optimizer_of(trainer).param_groups[0]["lr"])
        frames.append(count.frame_count)
    assert rates == [3e-4 / 2, 3e-4 / 8]
    assert frames == [30, 60]


# --------------------------------------------------------------------------- loggers


def scalars(folder, name):
    (path,) = folder.rglob(f"{name}.csv")
    return np.loadtxt(path, delimiter=",", ndmin=2)


def test_a_logger_receives_losses_and_values_of_hooks(make_loss, make_buffer, tmp_path):
    logger = CSVLogger("run", log_dir=str(tmp_path))
    trainer = make_trainer(make_loss, make_buffer, logger=logger, log_interval=20)
    LogScalar(REWARD, "r_training").register(trainer)
    means = trainer.optimization_stepper.track()
    trainer.train()
    assert scalars(tmp_path, "loss_qvalue")[:, 0].tolist() == [20, 40, 60]
    assert scalars(tmp_path, "r_training")[:, 0].tolist() == [20, 40, 60]
    assert_close(scalars(tmp_path, "loss_qvalue")[:, 1].mean(), means()["loss_qvalue"])


def test_the_log_interval_is_checked():
    with pytest.raises(ValueError, match="log_interval=0 must be an integer >= 1"):
        POGOTrainer.check_settings(3, log_interval=0)


def test_hook_classes_are_found():
    assert len(shipped_hooks()) >= 20
    assert all(inspect.isclass(kind) for kind in shipped_hooks().values())
