"""Fine-tuning of a chain in the environment, in a plain TorchRL loop.

python examples/pogo_finetune.py

A chain learns from offline data. Then its last actor collects new transitions, and training goes on
with one update per step on batches that are half offline and half new.
"""

import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBufferEnsemble, TensorDictReplayBuffer
from torchrl.envs import Compose, DoubleToFloat, GymWrapper, ObservationNorm, TransformedEnv
from torchrl.objectives import SoftUpdate

from pogo_torchrl import POGOLoss, make_actor, make_qvalue
from pogo_torchrl.data import make_replay_buffer
from pogo_torchrl.envs import make_env
from pogo_torchrl.evaluation import Evaluator, format_evaluation
from pogo_torchrl.export import on_raw_observations

TASK = "hopper-medium-v2"


def main(
    offline_steps: int = 2000, env_steps: int = 2000, episodes: int = 5, batch_size=256, **data
) -> list[float]:
    """Train offline, then online; return the last actor's score after each."""
    torch.manual_seed(0)
    offline = make_replay_buffer(TASK, batch_size=batch_size, **data)
    mean, std = offline.normalization
    evaluator = Evaluator(TASK, episodes=episodes)
    size, spec = evaluator.observation_dim, evaluator.action_spec
    actor, qvalue = make_actor(size, spec), make_qvalue(size, spec.shape[-1], layer_norm=True)
    loss = POGOLoss(actor, qvalue, step_sizes=(0.3, 0.3), w2_backend="fast")
    loss.make_value_estimator(gamma=0.99)
    targets = SoftUpdate(loss, tau=0.005)
    critics = torch.optim.Adam(loss.qvalue_params(), lr=3e-4)
    actors = [torch.optim.Adam(loss.actor_params(i), lr=3e-4) for i in range(loss.num_actors)]

    def update(batch):
        for optimizer, term in [(critics, loss.qvalue_loss)] + [
            (actors[i], lambda batch, i=i: loss.actor_loss(batch, i)) for i in range(len(actors))
        ]:
            optimizer.zero_grad()
            term(batch)[0].backward()
            optimizer.step()
        targets.step()

    def score() -> float:
        evaluations = evaluator([on_raw_observations(loss.actor(-1), mean, std)])
        print(format_evaluation(evaluations))
        return float(evaluations[0].scores.mean())

    for _ in range(offline_steps):
        update(offline.sample())
    scores = [score()]

    normalise = ObservationNorm(mean, std, in_keys=["observation"], standard_normal=True)
    env = TransformedEnv(GymWrapper(make_env(TASK)), Compose(DoubleToFloat(), normalise))
    # The last actor acts with z ~ N(0, I) in the collector: this is its exploration.
    collector = Collector(
        env, loss.actor(-1), frames_per_batch=50, total_frames=env_steps,
        auto_register_policy_transforms=False,  # the actor has no state
    )  # fmt: skip
    online = TensorDictReplayBuffer(storage=LazyTensorStorage(env_steps, device="auto"))
    both = ReplayBufferEnsemble(offline, online, sample_from_all=True, batch_size=batch_size)
    for steps in collector:
        online.extend(steps.select(*loss.in_keys).clear_device_())
        for _ in range(len(steps)):
            update(both.sample().contiguous().reshape(-1))
    return [*scores, score()]


if __name__ == "__main__":
    main()
