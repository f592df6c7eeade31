"""ReBRACLoss: values by hand, gradients, and TorchRL's conventions."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import MLP
from torchrl.objectives import SoftUpdate, TD3BCLoss, ValueEstimators

from pogo_torchrl import POGOLoss, ReBRACLoss, make_qvalue

OBSERVATION, ACTION, ROWS = 3, 2, 16
BOX = Bounded(low=torch.zeros(2), high=torch.tensor([4.0, 2.0]))
"""Half the ranges are 2 and 1."""


class Constant(nn.Module):
    def __init__(self, action):
        super().__init__()
        self.action = nn.Parameter(torch.tensor(action))

    def forward(self, observation):
        return self.action.expand(*observation.shape[:-1], ACTION)


class Affine(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.tensor(weight)),
            nn.Parameter(torch.tensor(bias)),
        )

    def forward(self, observation, action):
        return (action * self.weight).sum(-1, keepdim=True) + self.bias


def by_hand(**settings):
    """Actor (3, 1), which is (0.5, 0) in the box, where the critics are 6 and 4."""
    critics = [
        TensorDictModule(Affine(*values), ["observation", "action"], ["state_action_value"])
        for values in (([1.0, 2.0], 1.0), ([2.0, -1.0], -1.0))
    ]
    actor = TensorDictModule(Constant([3.0, 1.0]), ["observation"], ["action"])
    settings = {"policy_noise": 0.0, "action_spec": BOX, **settings}
    loss = ReBRACLoss(actor, critics, **settings)
    loss.make_value_estimator(gamma=0.5)
    return loss


def transitions(actions, next_actions=None, ends=None):
    rows = len(actions)
    done = torch.tensor(ends or [False] * rows)[:, None]
    batch = TensorDict(
        {
            "observation": torch.zeros(rows, OBSERVATION),
            "action": torch.tensor(actions),
            "next": {
                "observation": torch.zeros(rows, OBSERVATION),
                "reward": torch.ones(rows, 1),
                "done": done,
                "terminated": done.clone(),
            },
        },
        [rows],
    )
    if next_actions is not None:
        batch["next", "action"] = torch.tensor(next_actions)
    return batch


def networks(width=8):
    net = MLP(in_features=OBSERVATION, out_features=ACTION, num_cells=[width])
    actor = TensorDictModule(nn.Sequential(net, nn.Tanh()), ["observation"], ["action"])
    return actor, make_qvalue(OBSERVATION, ACTION, (width, width, width), layer_norm=True)


def random_batch(rows=ROWS):
    batch = transitions((2 * torch.rand(rows, ACTION) - 1).tolist())
    batch["observation"], batch["next", "observation"] = torch.randn(2, rows, OBSERVATION)
    batch["next", "action"] = 2 * torch.rand(rows, ACTION) - 1
    return batch


SPEC = Bounded(low=-torch.ones(ACTION), high=torch.ones(ACTION))


def test_loss_and_gradient_of_the_actor_by_hand():
    loss = by_hand(actor_bc_weight=0.4)
    # The data's actions are (0, 1) and (1, 0) in the box: squared distances 1.25 and 0.25.
    value, metadata = loss.actor_loss(transitions([[2.0, 2.0], [4.0, 1.0]]))
    assert value.item() == pytest.approx(0.4 * 0.75 - 4 / 4)
    assert {k: float(v) for k, v in metadata.items()} == pytest.approx(
        {"bc_loss": 0.75, "q_actor": 4.0, "lmbd": 0.25}
    )
    # In the box, 2 beta_1 mean(a - a_data) is 0.8 (0, -0.5); the smaller Q has slope (2, -1).
    (gradient,) = torch.autograd.grad(value, list(loss.actor_network_params.parameters()))
    expected = torch.tensor([0.8 * 0.0 / 2 - 2 / 4, 0.8 * -0.5 / 1 + 1 / 4])
    torch.testing.assert_close(gradient, expected)


def test_without_normalisation_lambda_is_1():
    loss = by_hand(actor_bc_weight=0.4, q_normalization=None)
    value, metadata = loss.actor_loss(transitions([[2.0, 2.0]]))
    assert value.item() == pytest.approx(0.4 * 1.25 - 4)
    assert float(metadata["lmbd"]) == 1


def test_td_target_by_hand():
    loss = by_hand(critic_bc_weight=0.5)
    # In the box, the next action is (0.5, 0) and the data's is (-0.5, 1): the penalty is 2.
    nan = float("nan")
    batch = transitions(
        [[0.0, 0.0]] * 3, [[1.0, 2.0], [nan, nan], [1.0, 2.0]], ends=[False, False, True]
    )
    targets = torch.tensor([1 + 0.5 * (4 - 0.5 * 2), 1 + 0.5 * 4, 1.0])
    value, metadata = loss.qvalue_loss(batch)
    predictions = torch.tensor([[1.0], [-1.0]])
    errors = (predictions - targets).square()
    torch.testing.assert_close(metadata["td_error"], errors)
    torch.testing.assert_close(value, errors.mean(1).sum())
    torch.testing.assert_close(metadata["target_value"], targets.mean())
    torch.testing.assert_close(metadata["next_state_value"], torch.tensor((3 + 4 + 3) / 3))


def test_the_target_is_that_of_pogo_with_the_same_penalty():
    torch.manual_seed(0)
    actor, qvalue = networks()
    settings = {"action_spec": SPEC, "critic_bc_weight": 0.3, "delay_actor": True}
    loss = ReBRACLoss(actor, qvalue, **settings)
    pogo = POGOLoss(copy.deepcopy(actor), copy.deepcopy(qvalue), w2_weights=[1.0], **settings)
    for name in ("qvalue_network_params", "target_qvalue_network_params"):
        getattr(pogo, name).data.update_(getattr(loss, name).data)
    batch = random_batch()
    results = []
    for each in (loss, pogo):
        torch.manual_seed(1)
        results.append(each.qvalue_loss(batch))
    torch.testing.assert_close(*(value for value, _ in results))
    torch.testing.assert_close(*(metadata for _, metadata in results))


def test_without_penalties_the_critics_are_those_of_td3_bc():
    torch.manual_seed(0)
    actor, qvalue = networks()
    loss = ReBRACLoss(actor, qvalue, action_spec=SPEC, critic_bc_weight=0.0)
    base = TD3BCLoss(copy.deepcopy(actor), qvalue, action_spec=SPEC, loss_function="l2")
    for name in ("qvalue_network_params", "target_qvalue_network_params"):
        getattr(base, name).data.update_(getattr(loss, name).data)
    batch = random_batch().exclude(("next", "action"))
    assert set(loss.in_keys) == set(base.in_keys) <= set(batch.keys(True, True))
    results = []
    for each in (loss, base):
        torch.manual_seed(1)
        results.append(each.qvalue_loss(batch)[0])
    torch.testing.assert_close(*results)


def test_each_loss_reaches_its_own_parameters_and_the_updater_the_targets():
    torch.manual_seed(0)
    loss = ReBRACLoss(*networks(), action_spec=SPEC)
    updater = SoftUpdate(loss, tau=0.5)
    batch = random_batch()
    out = loss(batch)
    assert list(out.keys()) == loss.out_keys
    assert all(out[key].dim() == 0 for key in loss.out_keys)
    assert batch["td_error"].shape == (ROWS,)
    names = dict(loss.named_parameters())
    for key, owner in (
        ("loss_actor", "actor_network_params"),
        ("loss_qvalue", "qvalue_network_params"),
    ):
        found = torch.autograd.grad(out[key], list(names.values()), allow_unused=True)
        reached = {name.split(".")[0] for name, g in zip(names, found) if g is not None}
        assert reached == {owner}
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(1.0)
    before = loss.target_actor_network_params.clone()
    updater.step()
    expected = (before.data + loss.actor_network_params.data) / 2
    torch.testing.assert_close(loss.target_actor_network_params.data, expected)


def test_keys_dispatch_and_value_estimators():
    torch.manual_seed(0)
    loss = ReBRACLoss(*networks(), action_spec=SPEC)
    batch = random_batch()
    torch.manual_seed(1)
    out = loss(batch.clone())
    torch.manual_seed(1)
    inputs = {"_".join(k) if isinstance(k, tuple) else k: batch[k] for k in loss.in_keys}
    for key, value in zip(loss.out_keys, loss(**inputs)):
        torch.testing.assert_close(value, out[key])

    actor, qvalue = networks()
    actor.out_keys, qvalue.in_keys = ["move"], ["observation", "move"]
    renamed = ReBRACLoss(actor, qvalue, action_spec=SPEC)
    renamed.set_keys(action="move", reward="gain")
    renamed.make_value_estimator().load_state_dict(loss.state_dict())
    assert ("next", "move") in renamed.in_keys
    batch.rename_key_("action", "move")
    batch["next"].rename_key_("action", "move").rename_key_("reward", "gain")
    torch.manual_seed(1)
    torch.testing.assert_close(renamed(batch), out)

    batch = random_batch()
    batch = batch.reshape(4, 4)
    loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9, lmbda=0.5)
    assert loss(batch)["loss_qvalue"].isfinite()


def test_weights_of_prioritised_samples_and_reduction():
    torch.manual_seed(0)
    actor, qvalue = networks()
    loss = ReBRACLoss(actor, qvalue, action_spec=SPEC, reduction="none", policy_noise=0.0)
    batch = random_batch()
    weights = torch.rand(ROWS)
    mean = ReBRACLoss(actor, qvalue, action_spec=SPEC, policy_noise=0.0)
    mean.load_state_dict(loss.state_dict())
    rows = loss(batch.clone())
    out = mean(batch.clone().set("priority_weight", weights))
    for key in ("loss_actor", "loss_qvalue"):
        torch.testing.assert_close(out[key], (rows[key] * weights).sum() / weights.sum())


def test_a_single_critic():
    loss = ReBRACLoss(*networks(), action_spec=SPEC, num_qvalue_nets=1)
    assert loss(random_batch())["loss_qvalue"].requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actor_bc_weight": -1}, "actor_bc_weight=-1 must be a finite number >= 0"),
        ({"critic_bc_weight": float("inf")}, "critic_bc_weight=inf must be"),
        ({"num_qvalue_nets": 0}, "num_qvalue_nets=0 must be an integer >= 1"),
        ({"loss_function": "mse"}, "loss_function='mse' is unknown"),
        ({"reduction": "max"}, "reduction='max' is unknown"),
        ({"q_normalization": "max"}, "q_normalization='max' is unknown"),
        ({"action_spec": None}, "ReBRACLoss needs action bounds"),
        ({"bounds": (-1, 1)}, "ReBRACLoss accepts either action_spec or bounds"),
    ],
)
def test_errors_name_the_setting(settings, message):
    with pytest.raises(ValueError, match=message):
        ReBRACLoss(*networks(), **{"action_spec": SPEC, **settings})


def test_errors_of_networks_and_batches():
    actor, qvalue = networks()
    with pytest.raises(ValueError, match="ReBRACLoss got 1 qvalue_networks but needs 2"):
        ReBRACLoss(actor, [qvalue], action_spec=SPEC)
    loss = ReBRACLoss(actor, qvalue, action_spec=SPEC)
    with pytest.raises(KeyError, match=r"critic_bc_weight > 0 needs .*next_action=True"):
        loss(random_batch().exclude(("next", "action")))
    with pytest.raises(KeyError, match="ReBRACLoss needs the key 'observation'"):
        loss(random_batch().exclude("observation"))


def test_targets_stay_free_of_gradients():
    loss = ReBRACLoss(*networks(), action_spec=SPEC)
    loss(random_batch())
    for name in ("actor", "qvalue"):
        target = getattr(loss, f"target_{name}_network_params")
        assert not any(value.requires_grad for value in target.values(True, True))
    assert not [name for name, _ in loss.named_parameters() if "target" in name]
