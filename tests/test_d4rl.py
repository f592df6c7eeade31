"""Tests of D4RL's datasets with a local server: faulty downloads and the resulting rows."""

from __future__ import annotations

import http.server
import json
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from processes import FORKS
from torchrl.data.datasets import D4RLExperienceReplay
from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

from pogo_torchrl.data import D4RLReplay, make_replay_buffer
from pogo_torchrl.data.d4rl import _MANIFEST
from pogo_torchrl.data.download import download
from pogo_torchrl.envs import TASKS

TASK = "hopper-medium-v2"
FILE = "hopper_medium-v2.hdf5"
ROWS = 60


def d4rl_file(path: Path, *, dtype=np.float32, flag_dtype=bool, seed=0) -> dict[str, np.ndarray]:
    """Write a small file like D4RL's, with next observations, infos and metadata."""
    rng = np.random.default_rng(seed)
    rows = {
        "observations": rng.normal(size=(ROWS, 11)).astype(dtype),
        "next_observations": rng.normal(size=(ROWS, 11)).astype(dtype),
        "actions": rng.uniform(-1, 1, size=(ROWS, 3)).astype(dtype),
        "rewards": rng.normal(size=ROWS).astype(dtype),
        "terminals": (rng.random(ROWS) < 0.1).astype(flag_dtype),
        "timeouts": (rng.random(ROWS) < 0.1).astype(flag_dtype),
        "infos/qpos": rng.normal(size=(ROWS, 6)).astype(dtype),
        "metadata/policy/fc0/bias": rng.normal(size=256).astype(dtype),
    }
    rows["terminals"][ROWS - 2] = True  # its next observation is in the row that d4rl drops
    rows["timeouts"][ROWS - 2 :] = False
    with h5py.File(path, "w") as file:
        for key, array in rows.items():
            file[key] = array
    return rows


def expected_rows(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reference implementation of ``d4rl.qlearning_dataset``."""
    kept = [i for i in range(len(rows["rewards"]) - 1) if not rows["timeouts"][i]]
    following = [i + 1 for i in kept]
    return {
        "observation": rows["observations"][kept].astype(np.float32),
        "action": rows["actions"][kept].astype(np.float32),
        ("next", "observation"): rows["observations"][following].astype(np.float32),
        ("next", "reward"): rows["rewards"][kept].astype(np.float32)[:, None],
        ("next", "terminated"): rows["terminals"][kept].astype(bool)[:, None],
        ("next", "done"): rows["terminals"][kept].astype(bool)[:, None],
        ("next", "truncated"): np.zeros((len(kept), 1), dtype=bool),
    }


def assert_rows(buffer, rows: dict[str, np.ndarray]) -> None:
    data = buffer[:]
    for key, values in expected_rows(rows).items():
        assert data[key].dtype == (torch.bool if values.dtype == bool else torch.float32)
        np.testing.assert_array_equal(data[key].numpy(), values, err_msg=str(key))


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` (path -> bytes); each request first consumes one of ``faults``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        fault = self.server.faults.pop(0) if self.server.faults else None
        body = self.server.files.get(self.path)
        if fault is not None and fault.isdigit():
            self.send_error(int(fault))
        elif body is None:
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault == "cut":
                body = body[: len(body) // 2]
            self.wfile.write(body)
            if fault == "silent":
                self.wfile.flush()
                time.sleep(3)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("pogo_torchrl.data.download.RETRY_SECONDS", (0.0, 0.0, 0.0))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def rows(tmp_path) -> dict[str, np.ndarray]:
    return d4rl_file(tmp_path / FILE)


@pytest.fixture
def official(server, rows, tmp_path, monkeypatch) -> Server:
    """The server, replacing D4RL's own."""
    monkeypatch.setitem(D4RL_DATASETS, TASK, f"{server.url}/gym_mujoco_v2/{FILE}")
    server.files[f"/gym_mujoco_v2/{FILE}"] = (tmp_path / FILE).read_bytes()
    return server


def replay(tmp_path, **kwargs) -> D4RLReplay:
    return D4RLReplay(TASK, cache_dir=tmp_path / "cache", progress=False, **kwargs)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("flag_dtype", [bool, np.uint8, np.float32])
def test_rows_match_qlearning_dataset(tmp_path, official, dtype, flag_dtype):
    rows = d4rl_file(tmp_path / FILE, dtype=dtype, flag_dtype=flag_dtype, seed=1)
    official.files[f"/gym_mujoco_v2/{FILE}"] = (tmp_path / FILE).read_bytes()
    buffer = replay(tmp_path)
    assert isinstance(buffer, D4RLExperienceReplay)
    assert_rows(buffer, rows)
    assert_rows(replay(tmp_path), rows)  # from the cache
    assert official.requests == [f"/gym_mujoco_v2/{FILE}"]  # downloaded once
    assert buffer.sample().shape == (256,)


def test_make_replay_buffer(tmp_path, official, rows):
    arguments = {"source": "d4rl", "cache_dir": tmp_path / "cache", "batch_size": 8}
    raw = make_replay_buffer(TASK, normalize=False, **arguments)
    assert_rows(raw, rows)
    again = make_replay_buffer(TASK, reward_shift=-1.0, **arguments)  # the same cache
    np.testing.assert_allclose(again[:]["next", "reward"], raw[:]["next", "reward"] - 1)
    np.testing.assert_allclose(again[:]["observation"].mean(0), torch.zeros(11), atol=1e-5)
    np.testing.assert_array_equal(again.episode_returns, raw.episode_returns)
    assert_rows(replay(tmp_path), rows)  # neither modified the cache
    ends = np.flatnonzero(rows["terminals"] | rows["timeouts"])
    first = rows["rewards"][: ends[0] + 1].astype(np.float64).sum()
    assert raw.episode_returns[0] == pytest.approx(first)
    assert len(raw.episode_returns) == len(ends)
    assert raw.sample()["action"].shape == (8, 3)


def test_task_horizon_is_used_for_files_without_timeouts(tmp_path, official):
    rows = d4rl_file(tmp_path / FILE)
    with h5py.File(tmp_path / FILE, "w") as file:
        for key in ("observations", "actions", "rewards"):
            file[key] = np.concatenate([rows[key]] * 40)
        file["terminals"] = np.zeros(ROWS * 40, dtype=bool)
    official.files[f"/gym_mujoco_v2/{FILE}"] = (tmp_path / FILE).read_bytes()
    assert (
        len(replay(tmp_path)) == ROWS * 40 - 1 - 2
    )  # the last row, and two time-outs after 1000 steps


@pytest.mark.parametrize("folder", ["", "/gym_mujoco_v2"])
def test_mirror_address(tmp_path, server, rows, folder):
    server.files[f"/copy{folder}/{FILE}"] = (tmp_path / FILE).read_bytes()
    assert_rows(replay(tmp_path, mirror=f"{server.url}/copy/"), rows)


@pytest.mark.parametrize("folder", ["", "gym_mujoco_v2"])
def test_mirror_folder(tmp_path, folder):
    (tmp_path / "copy" / folder).mkdir(parents=True)
    rows = d4rl_file(tmp_path / "copy" / folder / FILE)
    assert_rows(replay(tmp_path, mirror=tmp_path / "copy"), rows)
    rows = d4rl_file(tmp_path / "copy" / folder / FILE, seed=5)  # a different file is detected
    assert_rows(replay(tmp_path, mirror=tmp_path / "copy"), rows)


def test_mirror_folder_without_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"data.mirror=.*contains neither {FILE}"):
        replay(tmp_path, mirror=tmp_path)


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut"])
def test_transient_faults_are_retried(tmp_path, official, rows, fault):
    official.faults = [fault, fault]
    assert_rows(replay(tmp_path), rows)
    assert len(official.requests) == 3


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["cut"] * 4, r"connection closed after \d+ of \d+ bytes"),
        (["500"] * 4, "HTTP 500"),
        (["403"], "HTTP 403"),
        (["404"], "Not Found"),
    ],
)
def test_persistent_faults(tmp_path, official, rows, faults, message):
    official.faults = list(faults)
    with pytest.raises(ConnectionError, match=message) as error:
        replay(tmp_path)
    for alternative in ("data.mirror=", "data.source=hdf5 data.path=FILE", "data.source=local"):
        assert alternative in str(error.value)
    assert len(official.requests) == len(faults)
    kept = {p.name for p in (tmp_path / "cache" / "d4rl").iterdir()}
    assert kept <= {f".{TASK}.lock"}
    assert_rows(replay(tmp_path), rows)  # the next attempt succeeds


def test_offline(tmp_path, monkeypatch, server):
    monkeypatch.setitem(D4RL_DATASETS, TASK, f"http://127.0.0.1:9/{FILE}")
    with pytest.raises(ConnectionError, match=r"refused.*Try data\.mirror=https"):
        replay(tmp_path)


def test_silent_server(tmp_path, server):
    server.faults = ["silent"] * 4
    server.files["/file"] = bytes(10)
    # Ten of a hundred bytes, then silence.
    original = _Handler.send_header

    def longer(self, key, value):
        original(self, key, "100" if key == "Content-Length" else value)

    _Handler.send_header = longer
    try:
        with pytest.raises(ConnectionError, match="timed out"):
            download(f"{server.url}/file", tmp_path / "file", timeout=0.2, progress=False)
    finally:
        _Handler.send_header = original
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>Please log in</html>", "not a readable HDF5 file"),
        (b"", "not a readable HDF5 file"),
        ("without rewards", "lacks rewards"),
        ("cut", "not a readable HDF5 file"),
    ],
)
def test_invalid_content(tmp_path, official, rows, content, message):
    if content == "without rewards":
        with h5py.File(tmp_path / "other.hdf5", "w") as file:
            file["observations"], file["actions"] = rows["observations"], rows["actions"]
            file["terminals"] = rows["terminals"]
        content = (tmp_path / "other.hdf5").read_bytes()
    elif content == "cut":  # with a matching Content-Length
        content = official.files[f"/gym_mujoco_v2/{FILE}"][:3000]
    official.files[f"/gym_mujoco_v2/{FILE}"] = content
    with pytest.raises(ConnectionError, match=message):
        replay(tmp_path)
    official.files[f"/gym_mujoco_v2/{FILE}"] = (tmp_path / FILE).read_bytes()
    assert_rows(replay(tmp_path), rows)


def _tensor_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.memmap"))


@pytest.mark.parametrize("index", range(7))
def test_truncated_cached_tensors_are_recreated(tmp_path, official, rows, index, caplog):
    replay(tmp_path)
    files = _tensor_files(tmp_path / "cache" / "d4rl" / TASK)
    assert len(files) == 7
    content = files[index].read_bytes()
    files[index].write_bytes(content[: len(content) // 2])
    assert_rows(replay(tmp_path), rows)
    assert "recreating it" in caplog.text
    assert len(official.requests) == 1


def test_modified_cached_tensors_are_recreated(tmp_path, official, rows):
    replay(tmp_path)
    file = _tensor_files(tmp_path / "cache" / "d4rl" / TASK)[0]
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    assert_rows(replay(tmp_path), rows)


def test_outdated_cached_tensors_are_recreated(tmp_path, official, rows):
    replay(tmp_path)
    folder = tmp_path / "cache" / "d4rl" / TASK
    manifest = json.loads((folder / _MANIFEST).read_text())
    manifest["made"]["version"] = -1
    (folder / _MANIFEST).write_text(json.dumps(manifest))
    (folder / "next" / "done.memmap").unlink()
    assert_rows(replay(tmp_path), rows)


def test_cache_of_torchrls_own_class_is_not_used(tmp_path, official, rows):
    root = tmp_path / "cache" / "d4rl"
    root.mkdir(parents=True)
    theirs = D4RLExperienceReplay(TASK, 4, root=root, direct_download=True)
    assert (theirs[:]["next", "observation"] == 0).all(-1).any()  # must not be read
    assert_rows(replay(tmp_path), rows)


@pytest.mark.parametrize("damage", ["cut", "changed", "no checksum"])
def test_damaged_cached_file_is_downloaded_again(tmp_path, official, rows, damage, caplog):
    replay(tmp_path)
    file = tmp_path / "cache" / "d4rl" / FILE
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "changed":
        content[len(content) // 2] ^= 255
        file.write_bytes(content)
    else:
        file.with_suffix(".sha256").unlink()
    assert_rows(replay(tmp_path), rows)
    assert "downloading it again" in caplog.text
    assert len(official.requests) == 2


def _start(cache_dir: str, mirror: str) -> int:
    return len(D4RLReplay(TASK, cache_dir=cache_dir, mirror=mirror, progress=False))


def test_concurrent_runs_download_once(tmp_path, server, rows):
    server.files[f"/{FILE}"] = (tmp_path / FILE).read_bytes()
    with FORKS.Pool(2) as pool:
        jobs = [(str(tmp_path / "cache"), server.url)] * 2
        sizes = pool.starmap(_start, jobs)
    assert sizes[0] == sizes[1] == len(expected_rows(rows)["action"])
    assert server.requests == [f"/{FILE}"]


def test_unknown_task(tmp_path):
    with pytest.raises(ValueError, match="hopper-medium-v2"):
        D4RLReplay("hoper-medium-v2", cache_dir=tmp_path)


def test_unwritable_cache_dir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to"):
        D4RLReplay(TASK, cache_dir=tmp_path / "file")


def test_torchrl_knows_every_task():
    assert set(TASKS) <= set(D4RL_DATASETS)


def test_complete_caches_are_read_without_lock_and_without_writing(
    tmp_path, official, rows, monkeypatch
):
    replay(tmp_path)
    root = tmp_path / "cache" / "d4rl"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}

    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr("pogo_torchrl.data.d4rl.make_writable", refuse)
    monkeypatch.setattr("pogo_torchrl.data.d4rl.hold", refuse)
    assert_rows(replay(tmp_path), rows)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_caches_that_may_not_be_read_are_not_called_damaged(tmp_path, official, monkeypatch):
    replay(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pogo_torchrl.data.d4rl.sha256", refuse)
    with pytest.raises(
        PermissionError, match=r"cannot be read \(Permission denied\): ask its owner"
    ):
        replay(tmp_path)
