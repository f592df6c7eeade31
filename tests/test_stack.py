"""Stacked runs against the same runs trained one by one."""

from __future__ import annotations

import copy
import shutil
from contextlib import contextmanager, nullcontext

import pytest
import torch
from runs import Rows, assert_same, state
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torch.testing import assert_close
from torchrl.checkpoint import GlobalRNGState
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal

from pogo_torchrl import POGOLoss, POGOTrainer, make_actor, make_qvalue
from pogo_torchrl.experiments.jobs import Job
from pogo_torchrl.experiments.overrides import compose
from pogo_torchrl.experiments.run import run
from pogo_torchrl.experiments.run_stack import run_stack
from pogo_torchrl.experiments.sweep import make_jobs
from pogo_torchrl.experiments.sweep_file import MAX_STACK_SIZE, Run, group_stackable
from pogo_torchrl.trainers import TrainerStack
from pogo_torchrl.trainers.hooks import DivergenceError, LogMetrics

# seed, w2_weights, alpha
CASES = [(0, (0.2, 0.5), 1.0), (1, (0.2, 0.5), 1.0), (1, (0.7, 0.1), 0.3)]
TAU = 0.1


class Runs:
    """The trainers of CASES, created identically whether they are stacked or not."""

    def __init__(self, spec, buffer, *, stacked, folder=None, total=30, dtype, **settings):
        lr = settings.pop("lr", 1e-2)
        policy_freq = settings.pop("policy_freq", 1)
        self.rng, self.streams, self.trainers, self.sinks = GlobalRNGState(), [], [], []
        for index, (seed, weights, alpha) in enumerate(CASES):
            torch.manual_seed(seed)
            actor, qvalue = make_actor(3, spec, (8, 8)), make_qvalue(3, 2, (8, 8))
            loss = POGOLoss(
                actor.to(dtype), qvalue.to(dtype), w2_weights=weights, alpha=alpha, **settings
            ).to(dtype)
            sink = Rows()
            trainer = POGOTrainer(
                loss.make_value_estimator(gamma=0.9),
                buffer,
                total,
                lr=lr,
                tau=TAU,
                policy_freq=policy_freq,
                checkpoint_dir=folder and folder / str(index),
                checkpoint_interval=10,
                progress_bar=False,
                hooks=[LogMetrics([sink], 7)],
            )
            self.trainers.append(trainer)
            self.sinks.append(sink)
            self.streams.append(self.rng.state_dict())

    @contextmanager
    def active(self, index):
        self.rng.load_state_dict(self.streams[index])
        yield
        self.streams[index] = self.rng.state_dict()

    def resume(self):
        for index, trainer in enumerate(self.trainers):
            with self.active(index):
                trainer.resume()
        return self

    def train(self, *, compile=False):
        return TrainerStack(self.trainers, self.active, compile=compile).train()

    def train_singly(self):
        for index, trainer in enumerate(self.trainers):
            with self.active(index):
                trainer.train()
        return self


@pytest.fixture
def make(unit_spec, make_batch):
    spec = unit_spec.to(torch.float64)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(64), batch_size=16)
    batch = make_batch(64, dtype=torch.float64)
    batch["next", "action"] = batch["action"].roll(-1, 0)
    batch["next", "action"][::5] = torch.nan  # no next action
    buffer.extend(batch)

    def make_runs(**settings):
        settings.setdefault("w2_backend", "fast")
        return Runs(spec, buffer, dtype=torch.float64, **settings)

    return make_runs


def training_state(trainer):
    stepper = trainer.optimization_stepper
    found = stepper.state_dict()
    found["optimizers"] = {name: one["state"] for name, one in found["optimizers"].items()}
    return {"loss": dict(trainer.loss_module.state_dict()), "stepper": found}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"w2_backend": "exact", "num_samples": 3},
        {"delay_actor": True, "policy_freq": 2},
        {"delay_qvalue": False, "shared_noise": True},
        {"q_normalization": None, "num_qvalue_nets": 3, "average_actors": 0.1},
        {"critic_bc_weight": 0.1, "target_action": "min_clean_noisy"},
        {"advantage_temperature": 0.5, "actor_q": "mean"},
    ],
    ids=lambda settings: "_".join(settings) or "default",
)
def test_each_run_of_a_stack_equals_the_single_run(make, settings):
    alone = make(stacked=False, **settings).train_singly()
    stack = make(stacked=True, **settings)
    assert stack.train() == [None] * 3
    for one, other in zip(alone.trainers, stack.trainers):
        assert_close(training_state(other), training_state(one), rtol=1e-9, atol=1e-9)
    for one, other in zip(alone.sinks, stack.sinks):
        assert [step for step, _ in one.rows] == [7, 14, 21, 28, 30]
        assert_close(other.numbers(), one.numbers(), rtol=1e-9, atol=1e-9)
    # the three runs differ from each other
    weights = [trainer.loss_module.state_dict() for trainer in stack.trainers]
    key = next(key for key in weights[0] if key.endswith("weight"))
    assert not torch.allclose(weights[0][key], weights[1][key])
    assert not torch.allclose(weights[1][key], weights[2][key])


def test_a_run_resumes_alone_or_in_a_stack(make, tmp_path):
    uninterrupted = make(stacked=False).train_singly()
    first = make(stacked=True, folder=tmp_path, total=20)
    first.train()
    sizes = {sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in tmp_path.iterdir()}
    alone = make(stacked=False, folder=tmp_path / "alone", total=20).train_singly()
    size = sum(f.stat().st_size for f in (tmp_path / "alone" / "0").rglob("*") if f.is_file())
    assert max(sizes) < 1.1 * size  # no file holds the whole stack
    for folder, stacked in ((tmp_path, False), (tmp_path / "alone", True)):
        second = make(stacked=stacked, folder=folder).resume()
        assert {trainer.collected_frames for trainer in second.trainers} == {20}
        _ = second.train() if stacked else second.train_singly()
        for one, other in zip(uninterrupted.trainers, second.trainers):
            assert_close(training_state(other), training_state(one), rtol=1e-9, atol=1e-9)
    assert alone.trainers[0].collected_frames == 20


def test_an_error_in_one_run_ends_only_that_run(make):
    alone = make(stacked=False).train_singly()
    stack = make(stacked=True)
    broken = stack.trainers[1]

    def diverge():
        if broken.collected_frames >= 14:
            raise DivergenceError("Training has diverged")

    broken.register_op("post_steps", diverge)
    with torch.no_grad():  # NaN must not spread to other runs
        broken.loss_module.actor_params(0)[0].fill_(torch.nan)
    first, second, third = stack.train()
    assert (first, third) == (None, None)
    assert isinstance(second, DivergenceError)
    assert broken.collected_frames == 30  # it stays in the stack until the end
    for index in (0, 2):
        assert_close(
            training_state(stack.trainers[index]),
            training_state(alone.trainers[index]),
            rtol=1e-9,
            atol=1e-9,
        )


def test_trainers_at_different_updates_are_rejected(make):
    stack = make(stacked=True)
    stack.trainers[0].collected_frames = 3
    with pytest.raises(ValueError, match=r"must be at the same update, not at \[0, 3\]"):
        stack.train()


def test_hooks_of_unsupported_stages_are_rejected(make):
    stack = make(stacked=True)
    stack.trainers[1].register_op("pre_epoch", lambda batch: batch)
    with pytest.raises(ValueError, match="a stack does not support the stages pre_epoch"):
        stack.train()


def test_probabilistic_actors_are_rejected(unit_spec, make_buffer):
    net = nn.Sequential(MLP(in_features=3, out_features=4, depth=1), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
    )
    loss = POGOLoss(actor, make_qvalue(3, 2, (8,)), action_spec=unit_spec)
    trainer = POGOTrainer(loss, make_buffer(), 10, progress_bar=False)
    with pytest.raises(ValueError, match="a stack does not support actors that sample"):
        TrainerStack([trainer], lambda index: nullcontext())


def test_trainers_with_different_settings_are_rejected(make):
    stack = make(stacked=True)
    stack.trainers[2].optimization_stepper.clip_grad_norm = 1.0
    with pytest.raises(ValueError, match="trainers of a stack must share their settings"):
        stack.train()
    stack = make(stacked=True)
    stack.trainers[1].optimization_stepper.optimizers["actor_0"].param_groups[0]["eps"] = 1e-3
    with pytest.raises(ValueError, match="the optimizers of a stack must share their settings"):
        stack.train()
    stack = make(stacked=True)
    stack.trainers[1].optimization_stepper.optimizers["actor_0"].param_groups[0]["lr"] = 1.0
    with pytest.raises(ValueError, match="trainers of a stack must share their learning rates"):
        stack.train()


# --------------------------------------------------------------------------- runs and sweeps

SHORT = [
    "task=hopper-medium-v2", "total_steps=24", "eval_interval=12", "eval_episodes=1",
    "checkpoint_interval=10", "log_interval=6", "batch_size=16", "hidden_sizes=[16]",
    "data.size=2000", "compile=false", "resume=true", "progress_bar=false",
]  # fmt: skip


def options(folder, cache, *more):
    return [*SHORT, f"log_dir={folder}", f"data.cache_dir={cache}", *more]


def test_stacked_runs_write_the_same_files_as_single_runs(tmp_path):
    variants = [["seed=0", "w2_weights=[0.1]"], ["seed=1", "w2_weights=[0.3]"]]
    for own in variants:
        run(compose(options(tmp_path / "alone", tmp_path / "data", *own)))
    cfgs = [compose(options(tmp_path / "stack", tmp_path / "data", *own)) for own in variants]
    assert run_stack(cfgs) == [None, None]
    files = {
        folder: sorted(p.relative_to(tmp_path / folder) for p in (tmp_path / folder).rglob("*"))
        for folder in ("alone", "stack")
    }
    assert files["alone"] == files["stack"]
    for path in (tmp_path / "alone").rglob("evaluations.csv"):
        other = tmp_path / "stack" / path.relative_to(tmp_path / "alone")
        rows = [
            [line.split(",")[:3] for line in one.read_text().splitlines()] for one in (path, other)
        ]
        assert rows[0] == rows[1]
        assert len(rows[0]) == 5
    log = (tmp_path / "stack/hopper-medium-v2/w2_0.3/seed_1/training/train.log").read_text()
    assert "seed_0" not in log  # each run has its own log
    # starting finished runs again changes nothing
    before = state(tmp_path / "stack/hopper-medium-v2/w2_0.1/seed_0")
    assert run_stack(cfgs) == [None, None]
    assert_same(state(tmp_path / "stack/hopper-medium-v2/w2_0.1/seed_0"), before)


def test_a_run_that_cannot_start_does_not_affect_the_others(tmp_path):
    (tmp_path / "hopper-medium-v2").mkdir()
    (tmp_path / "hopper-medium-v2" / "w2_0.3").write_text("in the way")
    cfgs = [
        compose(options(tmp_path, tmp_path / "data", f"w2_weights=[{weight}]"))
        for weight in (0.3, 0.1)
    ]
    first, second = run_stack(cfgs)
    assert isinstance(first, OSError)
    assert second is None
    assert (tmp_path / "hopper-medium-v2/w2_0.1/seed_0/done.json").exists()


def runs_of(*variants):
    return [Run(tuple(v), compose([*SHORT, *v])) for v in variants]


def test_runs_that_differ_only_in_seed_weights_and_alpha_are_stacked():
    runs = runs_of(
        ["seed=0"], ["seed=1"], ["w2_weights=[1,2,3]"], ["alpha=3"], ["w2_weights=[1]"], ["lr=0.1"],
        ["task=hopper-medium-replay-v2"],
    )  # fmt: skip
    assert [len(group) for group in group_stackable(runs)] == [4, 1, 1, 1]
    many = runs_of(["seed=0"]) * (2 * MAX_STACK_SIZE + 1)
    assert [len(group) for group in group_stackable(many)] == [MAX_STACK_SIZE, MAX_STACK_SIZE, 1]


def test_a_backend_that_reads_the_whole_batch_is_rejected():
    runs = runs_of(["w2_backend=tensorized"])
    with pytest.raises(ValueError, match="stack=true needs w2_backend=fast or exact"):
        make_jobs(runs, stack=True)
    assert [len(job.runs) for job in make_jobs(runs)] == [1]


def test_a_job_with_several_runs_is_one_process(tmp_path):
    runs = runs_of(["seed=0"], ["seed=1"])
    (job,) = make_jobs(runs, stack=True)
    assert job.runs == tuple(runs)
    assert "--stack" in Job.command(runs)
    assert "--stack" not in Job.command(runs[:1])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_stack_equals_single_runs(make):
    alone, stack = make(stacked=False).train_singly(), make(stacked=True)
    assert stack.train(compile=True) == [None] * 3
    for one, other in zip(alone.trainers, stack.trainers):
        assert_close(training_state(other), training_state(one), rtol=1e-9, atol=1e-9)


def test_losses_stay_usable_without_make_value_estimator(unit_spec, make_batch, make_buffer):
    """The default estimator must not be created within the transform over the runs."""
    trainers = [
        POGOTrainer(
            POGOLoss(make_actor(3, unit_spec, (8,)), make_qvalue(3, 2, (8,)), w2_backend="fast"),
            make_buffer(),
            2,
            progress_bar=False,
        )
        for _ in range(2)
    ]
    assert TrainerStack(trainers, lambda _: nullcontext()).train() == [None, None]
    loss = copy.deepcopy(trainers[0].loss_module)
    assert torch.isfinite(loss(make_batch())["loss_qvalue"])
