"""Export of trained chains."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import torch

from pogo_torchrl import load_actors, make_actor
from pogo_torchrl.export import on_raw_observations, save_actors

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
    save_actors(tmp_path / "policy.safetensors", chain, hidden_sizes=HIDDEN)
    return tmp_path / "policy.safetensors"


def test_raw_observations_are_normalised(trained, chain):
    raw, noise = torch.randn(5, 3), torch.randn(5, 2)
    for actor, on_raw in zip(trained, chain):
        expected = actor(observation=(raw - MEAN) / STD, noise=noise)
        assert torch.equal(on_raw(observation=raw, noise=noise), expected)


def test_the_raw_policy_shares_the_trained_parameters(trained, chain):
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


def test_the_header_is_json(path):
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == {
        "format": "pogo_torchrl.actors",
        "version": "2",
        "hidden_sizes": "[8, 4]",
        "num_actors": "2",
        "weights": "raw",
    }
    assert header["actor_1.mean"]["shape"] == [3]


def test_loading_does_not_change_the_random_state(path):
    before = torch.get_rng_state()
    load_actors(path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped"])
def test_damaged_file(path, damage):
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "text": b"weights",
            "flipped": content.replace(b"pogo_torchrl.actors", b"pogo_torchrl.act0rs"),
        }[damage]
    )
    with pytest.raises(ValueError, match=r"policy\.safetensors"):
        load_actors(path)


def rewrite(path, tensors=(), **header):
    """Rewrite a file with other tensors and header entries; ``None`` removes one."""
    with safetensors.safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {**file.metadata(), **header}
    found = {k: v for k, v in {**found, **dict(tensors)}.items() if v is not None}
    metadata = {k: v for k, v in metadata.items() if v is not None}
    path.write_bytes(safetensors.torch.save(found, metadata))


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ({"format": None}, "not a policy written by pogo_torchrl"),
        ({"version": None}, "version None"),
        ({"version": "99"}, "version 99.*update pogo_torchrl"),
        ({"num_actors": None}, "num_actors"),
        ({"num_actors": "3"}, "num_actors=3"),
        ({"num_actors": "1000000000000"}, "num_actors"),
        ({"num_actors": "many"}, "many"),
        ({"hidden_sizes": "[8]"}, "hidden layers"),
        ({"hidden_sizes": "[8, 5]"}, "size mismatch"),
        ({"hidden_sizes": "[8, 10000000000000]"}, "size mismatch"),
        ({"hidden_sizes": "[8, 0]"}, "hidden_sizes"),
        ({"hidden_sizes": '["8", null]'}, "hidden_sizes"),
        ({"hidden_sizes": "8"}, "len"),
        ({"hidden_sizes": "__import__('os')"}, "damaged"),
    ],
)
def test_invalid_headers(path, header, named):
    rewrite(path, **header)
    with pytest.raises(ValueError, match=rf"policy\.safetensors.*{named}"):
        load_actors(path)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("bounds.low", None),
        ("bounds.low", torch.ones(3)),
        ("bounds.low", torch.tensor([5.0, 5.0])),
        ("bounds.high", torch.tensor([1.0, float("inf")])),
        ("actor_0.mean", None),
        ("actor_0.mean", torch.tensor(1.0)),
        ("actor_1.std", torch.ones(4)),
        ("actor_0.module.mlp.0.weight", torch.full((8, 5), float("nan"))),
        ("actor_0.module.mlp.0.weight", torch.zeros(8, 6)),
        ("actor_0.module.mlp.0.weight", torch.zeros(8, 5, dtype=torch.int64)),
        ("actor_0.module.mlp.9.weight", torch.zeros(1)),
        ("actor_7.mean", torch.zeros(3)),
    ],
)
def test_invalid_tensors(path, key, values):
    rewrite(path, {key: values})
    with pytest.raises(ValueError, match=r"policy\.safetensors is damaged \(.+\): export"):
        load_actors(path)


def test_torch_save_files_are_not_opened(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "policy.pt")
    with pytest.raises(
        ValueError, match=r"policy\.pt was written by torch\.save and is not opened"
    ):
        load_actors(tmp_path / "policy.pt")


@pytest.mark.parametrize(
    ("hidden", "named"), [((8,), "hidden_sizes=\\[8\\]"), ((8, 5), "hidden_sizes=\\[8, 5\\]")]
)
def test_mismatched_hidden_sizes_are_rejected(tmp_path, chain, hidden, named):
    with pytest.raises(ValueError, match=named):
        save_actors(tmp_path / "policy.safetensors", chain, hidden_sizes=hidden)
    assert list(tmp_path.iterdir()) == []


def test_actors_on_normalised_observations_are_rejected(tmp_path, trained):
    for actors in (trained, []):
        with pytest.raises(ValueError, match="on_raw_observations"):
            save_actors(tmp_path / "policy.safetensors", actors, hidden_sizes=HIDDEN)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"policy\.safetensors"):
        load_actors(tmp_path / "policy.safetensors")


def test_an_interrupted_write_keeps_the_old_file(path, chain, monkeypatch):
    before = path.read_bytes()

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_actors(path, chain[:1], hidden_sizes=HIDDEN)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["policy.safetensors"]


def test_saving_again_replaces_the_file(path, chain):
    save_actors(path, chain[:1], hidden_sizes=HIDDEN)
    assert len(load_actors(path)) == 1
    assert [p.name for p in path.parent.iterdir()] == ["policy.safetensors"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16, torch.bfloat16])
def test_narrower_observations_are_converted(path, dtype):
    actor, raw = load_actors(path)[-1], torch.arange(6).reshape(2, 3).to(dtype)
    action = actor(observation=raw)
    assert action.dtype == torch.float32
    torch.testing.assert_close(action, actor(observation=raw.float()))


def test_float64_observations_are_rejected(path):
    with pytest.raises(ValueError, match=r"float64, but this network expects torch\.float32"):
        load_actors(path)[-1](observation=torch.zeros(2, 3, dtype=torch.float64))


def test_a_loaded_chain_can_be_cast(path):
    raw = torch.randn(2, 3, dtype=torch.float64)
    action = load_actors(path)[-1].double()(observation=raw)
    assert action.dtype == torch.float64
    torch.testing.assert_close(action.float(), load_actors(path)[-1](observation=raw.float()))
