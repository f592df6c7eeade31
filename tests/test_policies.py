"""Trained chains on disk."""

from __future__ import annotations

import os

import pytest
import torch

from pogo_torchrl import load_actors, make_actor
from pogo_torchrl.policies import on_raw_observations, save_actors

HIDDEN = (8, 4)
MEAN, STD = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 2.0, 1.0])


@pytest.fixture
def trained(wide_spec):
    return [make_actor(3, wide_spec, HIDDEN) for _ in range(2)]


@pytest.fixture
def chain(trained):
    return [on_raw_observations(actor, MEAN, STD) for actor in trained]


@pytest.fixture
def path(tmp_path, chain):
    save_actors(tmp_path / "policy.pt", chain, hidden_sizes=HIDDEN)
    return tmp_path / "policy.pt"


def test_raw_observations_are_normalised_inside(trained, chain):
    raw, noise = torch.randn(5, 3), torch.randn(5, 2)
    for actor, on_raw in zip(trained, chain):
        expected = actor(observation=(raw - MEAN) / STD, noise=noise)
        assert torch.equal(on_raw(observation=raw, noise=noise), expected)


def test_the_raw_policy_follows_the_training(trained, chain):
    torch.nn.init.zeros_(trained[0].module.mlp[-1].weight)
    torch.nn.init.zeros_(trained[0].module.mlp[-1].bias)
    action = chain[0](observation=torch.randn(3))
    assert torch.equal(action, trained[0].action_loc)


def test_round_trip(path, chain, wide_spec):
    loaded = load_actors(path)
    assert len(loaded) == len(chain)
    raw, noise = torch.randn(5, 3), torch.randn(5, 2)
    for before, after in zip(chain, loaded):
        for z in (noise, torch.zeros_like(noise)):
            action = after(observation=raw, noise=z)
            assert torch.equal(action, before(observation=raw, noise=z))
            assert wide_spec.is_in(action[0])
        assert torch.equal(
            after(observation=raw), before(observation=raw, noise=torch.zeros_like(noise))
        )
        assert not any(p.requires_grad for p in after.parameters())
    first, second = (actor(observation=raw) for actor in loaded)
    assert not torch.equal(first, second)


def test_the_file_loads_without_running_code(path):
    content = torch.load(path, weights_only=True)
    assert content["format"] == "pogo_torchrl.actors"


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped"])
def test_damaged_file(path, damage):
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"weights",
            "flipped": whole.replace(b"pogo_torchrl.actors", b"pogo_torchrl.act0rs"),
        }[damage]
    )
    with pytest.raises(ValueError, match=r"policy\.pt"):
        load_actors(path)


@pytest.mark.parametrize(
    "content",
    [
        {"weights": torch.zeros(2)},
        [1, 2],
        {"format": "pogo_torchrl.actors"},
        {"format": "pogo_torchrl.actors", "version": 1},
    ],
    ids=["foreign", "list", "no version", "no actors"],
)
def test_foreign_file(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt"):
        load_actors(tmp_path / "other.pt")


def test_newer_version(path):
    content = torch.load(path, weights_only=True)
    torch.save({**content, "version": 99}, path)
    with pytest.raises(ValueError, match=r"version 99.*update pogo_torchrl"):
        load_actors(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"policy\.pt"):
        load_actors(tmp_path / "policy.pt")


def test_an_interrupted_write_leaves_the_old_file(path, chain, monkeypatch):
    before = path.read_bytes()

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_actors(path, chain[:1], hidden_sizes=HIDDEN)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["policy.pt"]


def test_writing_again_replaces_the_file(path, chain):
    save_actors(path, chain[:1], hidden_sizes=HIDDEN)
    assert len(load_actors(path)) == 1
    assert [p.name for p in path.parent.iterdir()] == ["policy.pt"]
