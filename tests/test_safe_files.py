"""Tests of untrusted files: no code execution, no access to other files, no memory exhaustion."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from test_data import random_rows, write

from pogo_torchrl import POGOTrainer, load_actors
from pogo_torchrl.data import behaviour_dataset, read_hdf5
from pogo_torchrl.data.policies import load_policies
from pogo_torchrl.files import digests
from pogo_torchrl.trainers.checkpoints import FORMAT_VERSION, is_intact


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path):
    """The file that an attack would create, which must not exist after the test."""
    mark = tmp_path / "the attack has run"
    yield mark
    assert not mark.exists()


def test_attack_works_with_plain_pickle(tmp_path):
    pickle.loads(pickle.dumps(Attack(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def trainer(make_loss, make_buffer, tmp_path):
    """Factory of trainers that share a folder, which already contains checkpoints."""

    def make() -> POGOTrainer:
        torch.manual_seed(0)
        return POGOTrainer(
            make_loss(), make_buffer(), 4, checkpoint_dir=tmp_path / "checkpoints",
            checkpoint_interval=4, progress_bar=False,
        )  # fmt: skip

    make().train()
    return make


def newest(tmp_path) -> Path:
    return max((tmp_path / "checkpoints").glob("step-*"))


def sign(checkpoint: Path) -> None:
    """Update the checksums, as an attacker could."""
    (checkpoint / "sha256.json").write_text(json.dumps(digests(checkpoint, without="sha256.json")))
    assert is_intact(checkpoint)


def write_torch_zip(path: Path, content: bytes) -> None:
    """Write a file in the format of ``torch.save`` with another pickle inside."""
    torch.save({"a": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, entry in entries.items():
            new.writestr(name, content if name.endswith("data.pkl") else entry)


@pytest.mark.parametrize("wrapped", [True, False])
def test_pickle_in_checkpoint_is_not_executed(trainer, tmp_path, mark, wrapped):
    files = sorted(newest(tmp_path).rglob("state.pt"))
    assert len(files) > 2
    for file in files:
        original = file.read_bytes()
        content = pickle.dumps({"a": Attack(mark)}, protocol=2)
        if wrapped:
            write_torch_zip(file, content)
        else:
            file.write_bytes(content)
        sign(newest(tmp_path))
        with pytest.raises(ValueError, match="does not fit this run"):
            trainer().resume()
        file.write_bytes(original)
    sign(newest(tmp_path))
    assert trainer().resume() == 4


@pytest.mark.parametrize(
    "target", ["../outside", "/tmp", "components/../../outside", "..\\outside"]
)
def test_checkpoint_manifest_cannot_point_outside(trainer, tmp_path, mark, target):
    (tmp_path / "checkpoints" / "outside").mkdir()
    (tmp_path / "checkpoints" / "outside" / "state.pt").write_bytes(pickle.dumps(Attack(mark)))
    manifest = json.loads((newest(tmp_path) / "manifest.json").read_text())
    next(iter(manifest["components"].values()))["path"] = target
    (newest(tmp_path) / "manifest.json").write_text(json.dumps(manifest))
    sign(newest(tmp_path))
    with pytest.raises(ValueError, match="Unsafe archive member path"):
        trainer().resume()


def test_checkpoint_with_links_is_skipped(trainer, tmp_path):
    file = next(newest(tmp_path).rglob("state.pt"))
    outside = tmp_path / "outside.pt"
    file.rename(outside)
    file.symlink_to(outside)
    assert trainer().resume() is None


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.clear(),
        lambda m: m.update(components=[]),
        lambda m: m.update(components={}),
        lambda m: m.update(metadata=None),
        lambda m: m.update(metadata={"format_version": FORMAT_VERSION, "fingerprint": []}),
        lambda m: m.update(format_version="new"),
        lambda m: m["components"].popitem(),
    ],
)
def test_invalid_manifest(trainer, tmp_path, change):
    path = newest(tmp_path) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    sign(newest(tmp_path))
    with pytest.raises(ValueError, match="step-"):
        trainer().resume()


def test_checkpoint_with_oversized_tensor(trainer, tmp_path):
    """A tensor of a terabyte backed by a storage of a few bytes."""
    file = newest(tmp_path) / "components"
    file = next(file.rglob("*loss_module*/state.pt"))
    state = torch.load(file, weights_only=True)
    key = next(k for k, v in state.items() if torch.is_tensor(v) and v.dim() > 1)
    state[key] = torch.zeros(1).expand(1_000_000, 250_000)
    torch.save(state, file)
    sign(newest(tmp_path))
    with pytest.raises(ValueError, match="does not fit this run"):
        trainer().resume()


# ------------------------------------------------------------------------------------ policies


def test_pickle_in_policy_file_is_not_executed(tmp_path, mark):
    path = tmp_path / "policy.safetensors"
    attack = pickle.dumps(Attack(mark))
    for content in (attack, pickle.dumps(Attack(mark), protocol=2), b"\x80\x02" + attack):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"policy\.safetensors"):
            load_actors(path)
    write_torch_zip(path, attack)
    with pytest.raises(ValueError, match=r"torch\.save and is not opened"):
        load_actors(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]},
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [2**63, 2**63 + 4]},
        {"dtype": "object", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
    ],
)
def test_policy_with_invalid_header(tmp_path, entry):
    header = json.dumps({"__metadata__": {"format": "pogo_torchrl.actors"}, "a": entry}).encode()
    path = tmp_path / "policy.safetensors"
    for length in (len(header), 10**15):
        path.write_bytes(length.to_bytes(8, "little") + header + b"\0" * 4)
        with pytest.raises(ValueError, match=r"policy\.safetensors is damaged"):
            load_actors(path)


def test_safetensors_files_of_other_programs(tmp_path):
    path = tmp_path / "model.safetensors"
    for metadata in (None, {"format": "pt"}):
        path.write_bytes(safetensors.torch.save({"w": torch.zeros(2)}, metadata))
        with pytest.raises(
            ValueError, match=r"model\.safetensors is not a policy written by pogo_torchrl"
        ):
            load_actors(path)


def test_bundled_policies_are_read_without_pickle(tmp_path, mark):
    np.savez(tmp_path / "hopper.npz", gain=np.array([Attack(mark)]), mean=np.zeros(1))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_policies("hopper", tmp_path)


# ------------------------------------------------------------------------------------ datasets

KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


@pytest.fixture
def outside(tmp_path):
    """Another file, with matching arrays."""
    return write(tmp_path / "secret.hdf5", random_rows())


def external_link(file, key, outside):
    del file[key]
    file[key] = h5py.ExternalLink(str(outside), key)


def relative_link(file, key, outside):
    del file[key]
    file[key] = h5py.ExternalLink(outside.name, key)


def missing_link(file, key, outside):
    del file[key]
    file[key] = h5py.ExternalLink("/nowhere.hdf5", key)


def soft_link_over_an_external_one(file, key, outside):
    del file[key]
    file["elsewhere"] = h5py.ExternalLink(str(outside), "/")
    file[key] = h5py.SoftLink(f"/elsewhere/{key}")


def circular_soft_link(file, key, outside):
    del file[key]
    file[key] = h5py.SoftLink(f"/{key}")


def external_storage(file, key, outside):
    shape, dtype = file[key].shape, file[key].dtype
    del file[key]
    size = int(np.prod(shape)) * dtype.itemsize
    file.create_dataset(key, shape, dtype, external=[(str(outside), 0, size)])


def virtual(file, key, outside):
    layout = h5py.VirtualLayout(file[key].shape, file[key].dtype)
    layout[...] = h5py.VirtualSource(str(outside), key, file[key].shape)
    del file[key]
    file.create_virtual_dataset(key, layout)


LINKS = [
    external_link, relative_link, missing_link, soft_link_over_an_external_one,
    circular_soft_link, external_storage, virtual,
]  # fmt: skip


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.__name__)
@pytest.mark.parametrize("key", KEYS)
def test_hdf5_links_are_not_followed(tmp_path, outside, link, key, monkeypatch):
    path = write(tmp_path / "data.hdf5", random_rows())
    with h5py.File(path, "r+") as file:
        link(file, key, outside)
    opened = []
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda self, index: opened.append(self.name))
    with pytest.raises(ValueError, match=rf"data\.hdf5: .*links are not followed.*{key}"):
        read_hdf5(path)
    assert opened == []


def test_cached_file_with_links_is_regenerated(tmp_path, outside):
    path = behaviour_dataset("hopper-medium-v2", size=20, cache_dir=tmp_path, progress=False)
    before = path.read_bytes()
    with h5py.File(path, "r+") as file:
        external_link(file, "rewards", outside)
    assert (
        behaviour_dataset("hopper-medium-v2", size=20, cache_dir=tmp_path, progress=False) == path
    )
    assert path.read_bytes() == before


def limit_memory() -> None:
    """Limit the address space to 8 GB; run in a child process before it starts."""
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))


BOMBS = {
    "rows that were never written": {"shape": (10**12,), "chunks": (1000,)},
    "rows of a fill value": {"shape": (10**12,), "chunks": (1000,), "fillvalue": 1.0},
    "some of many rows": {"shape": (10**11,), "chunks": (1000,), "compression": "gzip"},
    "a chunk larger than the array": {
        "shape": (40,),
        "maxshape": (None,),
        "chunks": (500_000_000,),
        "compression": "gzip",
    },
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("key", KEYS)
def test_sizes_are_checked_before_allocation(tmp_path, name, key):
    options = dict(BOMBS[name])
    width = {"observations": 3, "actions": 2}.get(key)
    if width:
        options["shape"] = (*options["shape"], width)
        options["chunks"] = (options["chunks"][0] // width, width)
        if "maxshape" in options:
            options["maxshape"] = (None, width)
    path = write(tmp_path / "data.hdf5", {k: v for k, v in random_rows().items() if k != key})
    with h5py.File(path, "r+") as file:
        array = file.create_dataset(key, dtype="f8", **options)
        if "some" in name:
            array[:40] = 1.0
        rows = array.shape[0]
        for other in KEYS if rows > 40 else ():  # equal lengths, so that only the size is wrong
            if other != key:
                tail = (*file[other].shape[1:],)
                del file[other]
                file.create_dataset(other, (rows, *tail), "f8", chunks=(1000, *tail))
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"data\.hdf5: \w+ declares .* GB") as error:
        read_hdf5(path)
    assert "recreate it or download it again" in str(error.value)


def test_oversized_file_fails_without_allocation(tmp_path):
    """A process with limited memory raises the documented error, not a MemoryError."""
    path = tmp_path / "data.hdf5"
    with h5py.File(path, "w") as file:
        for key in KEYS:
            tail = {"observations": (11,), "actions": (3,)}.get(key, ())
            file.create_dataset(key, (10**12, *tail), "f4", chunks=(1000, *tail))
    code = f"from pogo_torchrl.data import read_hdf5; read_hdf5({str(path)!r})"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit_memory
    )
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("pogo_torchrl.data.hdf5.UnsupportedFileError: ")
    assert "data.hdf5: observations declares 4.4e+04 GB" in last


def test_file_larger_than_physical_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "data.hdf5", random_rows())
    monkeypatch.setattr("pogo_torchrl.data.hdf5.physical_memory", lambda: 1000.0)
    with pytest.raises(ValueError, match=r"needs .* GB of memory, but this machine has 1e-06 GB"):
        read_hdf5(path)


def test_compressed_files_are_read(tmp_path):
    """Flags and rewards in D4RL's files are mostly zeros and compress a thousandfold."""
    rows = {
        "observations": np.random.default_rng(0).normal(size=(300_000, 3)).astype("f4"),
        "actions": np.zeros((300_000, 2), "f4"),
        "rewards": np.zeros(300_000),
        "terminals": np.zeros(300_000, bool),
    }
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for key, values in rows.items():
            file.create_dataset(key, data=values, compression="gzip", compression_opts=9)
        file.create_dataset("timeouts", (300_000,), bool)  # declared but never written: all False
    assert len(read_hdf5(tmp_path / "data.hdf5").transitions) == 299_999
