"""Values of critics with stacked parameters."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor


def critic_values(
    network: TensorDictModule,
    critics: TensorDictBase,
    state: TensorDictBase,
    action: Tensor,
    *,
    action_key: NestedKey,
    value_key: NestedKey,
) -> Tensor:
    """Compute Q(s, a) with each of several critics.

    Args:
        network: the network of a critic.
        critics: parameters of the critics, stacked ``[C]``, or of a single one.
        state: the states ``[*B]``.
        action: the actions ``[*B, d]``.

    Keyword Args:
        action_key: key from which the network reads the action.
        value_key: key to which it writes its value.

    Returns:
        The values ``[C, *B]``.
    """
    values = []
    for critic in critics.unbind(0) if critics.ndim else (critics,):
        inputs = state.select(*network.in_keys, strict=False).set(action_key, action)
        with critic.to_module(network, preserve_module_state=False):
            values.append(network(inputs).get(value_key).squeeze(-1))
    return torch.stack(values)
