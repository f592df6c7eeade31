"""The stacked Adam against torch's, network by network."""

from __future__ import annotations

import pytest
import torch

from pogo_torchrl.optim import StackedAdam


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_slice_is_an_adam_of_its_own(dtype):
    torch.manual_seed(0)
    params = [torch.randn(3, 4, 5, dtype=dtype), torch.randn(3, 5, dtype=dtype)]
    singles = [[torch.nn.Parameter(p[i].clone()) for p in params] for i in range(3)]
    references = [torch.optim.Adam(own, lr=0.01) for own in singles]
    adam = StackedAdam(params, lr=0.01)
    for index in (0, 1, None, 1, 2, None, 1) * 20:
        gradients = [torch.randn_like(p) for p in params]
        adam.step(gradients, index)
        for i in range(3) if index is None else (index,):
            for own, gradient in zip(singles[i], gradients):
                own.grad = gradient[i].clone()
            references[i].step()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for i in range(3):
        for mine, theirs in zip(params, singles[i]):
            torch.testing.assert_close(mine[i], theirs.data, rtol=tolerance, atol=tolerance)


def test_state_dict_round_trip():
    def run(adam, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            adam.step([torch.randn(2, 3)], seed % 2)

    whole = StackedAdam([torch.zeros(2, 3)], lr=0.1)
    run(whole, range(6))
    first = StackedAdam([torch.zeros(2, 3)], lr=0.1)
    run(first, range(3))
    second = StackedAdam([first.params[0].clone()], lr=0.1)
    second.load_state_dict(first.state_dict())
    run(second, range(3, 6))
    assert torch.equal(second.params[0], whole.params[0])
    run(second, [6])
    assert not torch.equal(first.exp_avg[0], second.exp_avg[0])  # no memory is shared
