"""Fixtures shared by several test files."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Must be set before torch is imported: parallel workers must not compete for cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hydra.core.config_store import ConfigStore
from runs import SMALL
from tensordict import TensorDict
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer

from pogo_torchrl import POGOLoss, make_actor, make_qvalue

# Hydra copies its registry at each composition, with all of TorchRL's entries in it, which takes
# most of the time. It need not: every entry is copied when it is used.
ConfigStore.__deepcopy__ = lambda self, memo: self


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with `pytest -m slow`")


def pytest_xdist_auto_num_workers(config):
    """Number of workers for ``-n auto``; each needs half a gigabyte and a core to compile on."""
    return min(os.cpu_count() or 1, 4)


def pytest_collection_modifyitems(config, items):
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; run with `pytest -m slow`"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def unit_spec():
    """Two actions in [-1, 1]."""
    return Bounded(low=-torch.ones(2), high=torch.ones(2))


@pytest.fixture
def wide_spec():
    """Two actions whose bounds are neither symmetric nor equal."""
    return Bounded(low=torch.tensor([-1.0, 0.5]), high=torch.tensor([3.0, 2.0]))


@pytest.fixture
def make_batch(unit_spec):
    """Factory of offline batches with 3 observations; every second row is done, every fourth
    terminated.
    """

    def make(*batch_size: int, spec: Bounded = unit_spec, dtype=torch.float32) -> TensorDict:
        batch_size = batch_size or (8,)
        rows = torch.arange(torch.Size(batch_size).numel()).reshape(*batch_size, 1)
        return TensorDict(
            {
                "observation": torch.randn(*batch_size, 3, dtype=dtype),
                "action": spec.rand(batch_size).to(dtype),
                "next": {
                    "observation": torch.randn(*batch_size, 3, dtype=dtype),
                    "reward": torch.randn(*batch_size, 1, dtype=dtype),
                    "done": rows % 2 == 0,
                    "terminated": rows % 4 == 0,
                },
            },
            batch_size,
        )

    return make


@pytest.fixture
def make_loss(unit_spec):
    """Factory of small losses for the batches of ``make_batch``; two actors by default."""

    def make(spec: Bounded = unit_spec, **kwargs) -> POGOLoss:
        kwargs.setdefault("w2_weights", (0.2, 0.5))
        actor, qvalue = make_actor(3, spec, (8, 8)), make_qvalue(3, 2, (8, 8))
        return POGOLoss(actor, qvalue, **kwargs).make_value_estimator(gamma=0.9)

    return make


@pytest.fixture
def make_buffer(make_batch):
    """Factory of replay buffers filled with batches of ``make_batch``."""

    def make(rows: int = 64, batch_size: int = 16) -> TensorDictReplayBuffer:
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(rows), batch_size=batch_size)
        buffer.extend(make_batch(rows))
        return buffer

    return make


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Cache folder with data, shared by all runs of a file."""
    from pogo_torchrl.data import behaviour_dataset

    folder = tmp_path_factory.mktemp("cache")
    behaviour_dataset("hopper-medium-v2", size=2000, cache_dir=folder, progress=False)
    return folder


@pytest.fixture
def options(cache, tmp_path):
    """Options of a run of six updates in the folder of the test."""
    return [*SMALL, "total_steps=6", f"log_dir={tmp_path / 'logs'}", f"data.cache_dir={cache}"]


@pytest.fixture
def make_cfg(options):
    """Factory of such runs, with further options."""
    from pogo_torchrl.configs import compose

    return lambda *overrides: compose([*options, *overrides])
