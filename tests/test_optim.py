"""Adam against torch's."""

from __future__ import annotations

import pytest
import torch

from pogo_torchrl.optim import Adam


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_gives_the_numbers_of_torch(dtype):
    torch.manual_seed(0)
    params = [torch.randn(4, 5, dtype=dtype), torch.randn(5, dtype=dtype)]
    copies = [torch.nn.Parameter(p.clone()) for p in params]
    adam, reference = Adam(params, lr=0.01), torch.optim.Adam(copies, lr=0.01)
    for _ in range(140):
        for copy in copies:
            copy.grad = torch.randn_like(copy)
        adam.step(tuple(copy.grad for copy in copies))
        reference.step()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for mine, theirs in zip(params, copies):
        torch.testing.assert_close(mine, theirs.data, rtol=tolerance, atol=tolerance)


def test_state_dict_round_trip():
    def run(adam, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            adam.step((torch.randn(2, 3),))

    whole = Adam([torch.zeros(2, 3)], lr=0.1)
    run(whole, range(6))
    first = Adam([torch.zeros(2, 3)], lr=0.1)
    run(first, range(3))
    second = Adam([first.params[0].clone()], lr=0.1)
    second.load_state_dict(first.state_dict())
    run(second, range(3, 6))
    assert torch.equal(second.params[0], whole.params[0])
    run(second, [6])
    assert not torch.equal(first.exp_avg[0], second.exp_avg[0])  # no memory is shared
