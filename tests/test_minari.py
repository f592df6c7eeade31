"""Tests of reading Minari datasets, local and remote."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import h5py
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Tuple

from pogo_torchrl.data import make_replay_buffer
from pogo_torchrl.data.hdf5 import read_hdf5
from pogo_torchrl.data.minari import read_minari

minari = pytest.importorskip("minari")
EpisodeBuffer = pytest.importorskip("minari.data_collector").EpisodeBuffer

ID = "tiny/steps-v0"
ACTIONS = Box(-1, 1, (2,))
# Length of each episode, and how it ends.
EPISODES = [(4, "truncated"), (3, "terminated"), (5, "neither"), (2, "both")]
EPISODES += [(1, "terminated"), (1, "truncated")] * 4 + [(3, "terminated")]


def vector(size: int, dtype: type = np.float64) -> Box:
    return Box(-np.inf, np.inf, (size,), dtype=dtype)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "datasets"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    return folder


def episode(length: int, end: str, rng: np.random.Generator) -> dict:
    terminations, truncations = np.zeros((2, length), dtype=bool)
    terminations[-1], truncations[-1] = end in ("terminated", "both"), end in ("truncated", "both")
    return {
        "observations": rng.normal(size=(length + 1, 3)),
        "actions": rng.uniform(-1, 1, size=(length, 2)).astype(np.float32),
        "rewards": rng.normal(size=length),
        "terminations": terminations,
        "truncations": truncations,
    }


def random_episodes(seed: int = 0, shape: list[tuple[int, str]] = EPISODES) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [episode(length, end, rng) for length, end in shape]


def write(episodes: list[dict], dataset_id: str = ID, observation_space=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing metadata such as authors
        return minari.create_dataset_from_buffers(
            dataset_id,
            [EpisodeBuffer(**each, infos={}) for each in episodes],
            observation_space=observation_space or vector(3),
            action_space=ACTIONS,
        )


def main_file(root: Path, dataset_id: str = ID) -> Path:
    return root / dataset_id / "data" / "main_data.hdf5"


def kept(episodes: list[dict]) -> list[tuple[int, int]]:
    """Episode and step of each row: all steps except truncated ones and the very last one."""
    rows = [(e, t) for e, each in enumerate(episodes) for t in range(len(each["rewards"]))]
    return [(e, t) for e, t in rows[:-1] if not episodes[e]["truncations"][t]]


def test_make_replay_buffer():
    write(random_episodes())
    buffer = make_replay_buffer(
        "hopper-medium-v2", source="minari", path=ID, batch_size=4, normalize=False
    )
    expected = read_minari(ID)
    for key, values in expected.transitions.items(True, True):
        assert torch.equal(buffer[:][key], values)
    np.testing.assert_array_equal(buffer.episode_returns, expected.episode_returns)


@pytest.mark.parametrize("seed", range(2))
def test_rows(seed):
    episodes = random_episodes(seed)
    write(episodes)
    data = read_minari(ID).transitions
    rows = kept(episodes)
    assert len(data) == len(rows)
    for i, (e, t) in enumerate(rows):
        for value, expected in [
            (data["observation"], episodes[e]["observations"][t]),
            (data["next", "observation"], episodes[e]["observations"][t + 1]),
            (data["action"], episodes[e]["actions"][t]),
            (data["next", "reward"], episodes[e]["rewards"][t]),
            (data["next", "terminated"], episodes[e]["terminations"][t]),
        ]:
            np.testing.assert_array_equal(
                value[i].numpy(), np.asarray(expected, value.numpy().dtype)
            )


def test_layout():
    write(random_episodes())
    data = read_minari(ID).transitions
    rows = len(data)
    assert set(data.keys(include_nested=True, leaves_only=True)) == {
        "observation",
        "action",
        *(("next", key) for key in ("observation", "reward", "done", "terminated", "truncated")),
    }
    for key in ("done", "terminated", "truncated", "reward"):
        assert data["next", key].shape == (rows, 1)
    floats = ("observation", "action", ("next", "observation"), ("next", "reward"))
    assert {data[key].dtype for key in floats} == {torch.float32}
    assert data["next", "done"].dtype == torch.bool
    assert torch.equal(data["next", "done"], data["next", "terminated"])
    assert not data["next", "truncated"].any()
    assert data["next", "terminated"].any()


def test_rows_match_the_same_data_in_d4rl_layout(tmp_path):
    # All ends are marked, as in D4RL's files, which do not store the next observation there.
    episodes = random_episodes(shape=[each for each in EPISODES if each[1] != "neither"])
    write(episodes)
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for name, key in {"terminations": "terminals", "truncations": "timeouts"}.items():
            file[key] = np.concatenate([each[name] for each in episodes])
        for key in ("actions", "rewards"):
            file[key] = np.concatenate([each[key] for each in episodes])
        file["observations"] = np.concatenate([each["observations"][:-1] for each in episodes])
    ours, d4rl = read_minari(ID), read_hdf5(tmp_path / "data.hdf5")
    for key in ("observation", "action", ("next", "reward"), ("next", "terminated")):
        assert torch.equal(ours.transitions[key], d4rl.transitions[key])
    alive = ~ours.transitions["next", "terminated"].squeeze(-1)
    following = ("next", "observation")
    assert torch.equal(ours.transitions[following][alive], d4rl.transitions[following][alive])
    np.testing.assert_allclose(ours.episode_returns, d4rl.episode_returns, rtol=1e-5, atol=1e-5)


def test_no_row_crosses_episodes():
    episodes = random_episodes()
    for number, each in enumerate(episodes):
        each["observations"][:, 0] = number + 1
    write(episodes)
    data = read_minari(ID).transitions
    assert torch.equal(data["observation"][:, 0], data["next", "observation"][:, 0])
    assert data["observation"][:, 0].unique().numel() > 5


def test_rows_match_minaris_own_iteration():
    write(random_episodes(shape=[(6, "terminated"), (5, "truncated"), (7, "terminated")]))
    dataset, data = minari.load_dataset(ID), read_minari(ID).transitions
    assert len(data) == dataset.total_steps - 1 - 1
    first, last = dataset[0], dataset[2]
    np.testing.assert_array_equal(data["observation"][:6], first.observations[:-1].astype("f4"))
    np.testing.assert_array_equal(
        data["next", "observation"][:6], first.observations[1:].astype("f4")
    )
    np.testing.assert_array_equal(data["observation"][-6:], last.observations[:6].astype("f4"))
    np.testing.assert_array_equal(data["action"][-6:], last.actions[:6])


def test_truncated_step_inside_an_episode():
    (each,) = random_episodes(shape=[(6, "terminated")])
    each["truncations"][2] = True
    write([each])
    data = read_minari(ID).transitions
    steps = [0, 1, 3, 4]
    np.testing.assert_array_equal(data["observation"], each["observations"][steps].astype("f4"))


def test_returns_of_complete_episodes():
    episodes = random_episodes()
    write(episodes)
    expected = [sum(e["rewards"]) for e, (_, end) in zip(episodes, EPISODES) if end != "neither"]
    returns = read_minari(ID).episode_returns
    np.testing.assert_allclose(returns, expected, rtol=1e-5, atol=1e-5)
    assert returns.dtype == np.float64


def test_return_of_unfinished_episodes():
    episodes = random_episodes(shape=[(3, "neither"), (4, "neither")])
    write(episodes)
    returns = read_minari(ID).episode_returns
    np.testing.assert_allclose(returns, [sum(e["rewards"]) for e in episodes], rtol=1e-5)


def goals(episodes: list[dict], **parts: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    for each in episodes:
        length = len(each["observations"])
        each["observations"] = {
            key: rng.normal(size=(length, *shape)) for key, shape in parts.items()
        }


def test_antmaze_observations_match_d4rl():
    episodes = random_episodes(shape=[(3, "truncated"), (4, "terminated")])
    goals(episodes, observation=(27,), desired_goal=(2,), achieved_goal=(2,))
    sizes = {"achieved_goal": 2, "desired_goal": 2, "observation": 27}
    write(
        episodes,
        observation_space=Dict({key: vector(size) for key, size in sizes.items()}),
    )
    data = read_minari(ID).transitions
    assert data["observation"].shape == (5, 29)
    first = episodes[0]["observations"]
    expected = np.concatenate([first["achieved_goal"], first["observation"]], axis=1).astype("f4")
    np.testing.assert_array_equal(data["observation"][:2], expected[:2])
    np.testing.assert_array_equal(data["next", "observation"][:2], expected[1:3])


@pytest.mark.parametrize(
    "space",
    [
        Dict({"observation": vector(3), "achieved_goal": Dict({"kettle": vector(2)})}),
        Dict({"observation": vector(3)}),
        Dict({"image": Box(0, 255, (8, 8, 3), dtype=np.uint8)}),
        Tuple((vector(3), vector(2))),
        Box(0, 255, (8, 8, 3), dtype=np.uint8),
        Box(-1, 1, ()),
        Discrete(5),
    ],
)
def test_unsupported_observation_spaces(space, root):
    write(random_episodes())
    other_space(root, "observation_space", space)
    with pytest.raises(
        ValueError, match=rf"data\.path='{ID}' has observations in .*one-dimensional Box"
    ):
        read_minari(ID)


@pytest.mark.parametrize("space", [Discrete(3), Box(-1, 1, (2, 2)), Tuple((ACTIONS,))])
def test_unsupported_action_spaces(space, root):
    write(random_episodes())
    other_space(root, "action_space", space)
    with pytest.raises(ValueError, match=rf"data\.path='{ID}' has actions in .*continuous"):
        read_minari(ID)


def change_metadata(root: Path, **changes) -> None:
    path = root / ID / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_space(root: Path, key: str, space) -> None:
    from minari.serialization import serialize_space

    change_metadata(root, **{key: serialize_space(space)})


@pytest.mark.parametrize(
    "dataset_id", ["hopper-medium", "../up-v0", "a//b-v0", "x.hdf5", "hf://farama/a-v0", ""]
)
def test_malformed_ids(dataset_id):
    with pytest.raises(ValueError, match=r"data\.path=.* is not a valid Minari dataset ID.*-vN"):
        read_minari(dataset_id)


def test_without_minari(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r'pip install "pogo_torchrl\[minari\]"'):
        read_minari(ID)


@pytest.mark.parametrize("name", ["main_data.hdf5", "metadata.json"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty", "missing"])
def test_damaged_datasets(root, name, damage):
    write(random_episodes())
    path = root / ID / "data" / name
    intact = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": intact[: len(intact) // 2], "text": b"no", "empty": b""}[damage])
    with pytest.raises(ValueError, match=rf"data\.path='{ID}' is damaged.*delete {root / ID}"):
        read_minari(ID)


def test_missing_episode(root):
    write(random_episodes())
    with h5py.File(main_file(root), "a") as file:
        del file["episode_3"]
    with pytest.raises(ValueError, match=rf"data\.path='{ID}' is damaged"):
        read_minari(ID)


@pytest.mark.parametrize(("steps", "word"), [(200, "only"), (20, "more than")])
def test_steps_that_differ_from_the_metadata(root, steps, word):
    dataset = write(random_episodes())
    assert dataset.total_steps not in (20, 200)
    change_metadata(root, total_steps=steps)
    with pytest.raises(ValueError, match=rf"data\.path='{ID}' has {word} .*says {steps}"):
        read_minari(ID)


@pytest.mark.parametrize("shape", [[], [(1, "terminated")]])
def test_too_few_steps(shape):
    write(random_episodes(shape=shape))
    with pytest.raises(ValueError, match=rf"data\.path='{ID}' has [01] steps; at least 2"):
        read_minari(ID)


def test_no_usable_row():
    write(random_episodes(shape=[(1, "truncated")] * 3))
    with pytest.raises(ValueError, match=rf"data\.path='{ID}' contains no transition"):
        read_minari(ID)


def test_all_zero_observations():
    episodes = random_episodes()
    for each in episodes:
        each["observations"] *= 0
    write(episodes)
    with pytest.raises(ValueError, match=rf"data\.path='{ID}' has only zeros"):
        read_minari(ID)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("key", ["observations", "rewards"])
def test_non_finite_values(key, value):
    episodes = random_episodes()
    episodes[2][key][3] = value
    write(episodes)
    with pytest.raises(ValueError, match=rf"data\.path='{ID}', episode 2: {key}\[3.*not finite"):
        read_minari(ID)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("observations", (3, 3)),
        ("observations", (4, 2)),
        ("actions", (3, 1)),
        ("actions", (2, 2)),
        ("rewards", (3, 1)),
        ("terminations", (2,)),
        ("truncations", (4,)),
    ],
)
def test_mismatched_shapes(root, key, shape):
    write(random_episodes())
    with h5py.File(main_file(root), "a") as file:
        del file["episode_1"][key]
        file["episode_1"][key] = np.ones(shape)
    with pytest.raises(ValueError, match=rf"data\.path='{ID}', episode 1: {key} has shape"):
        read_minari(ID)


def test_mismatched_parts_of_an_observation(root):
    episodes = random_episodes(shape=[(3, "terminated")])
    goals(episodes, observation=(3,), achieved_goal=(2,))
    write(episodes, observation_space=Dict(observation=vector(3), achieved_goal=vector(2)))
    with h5py.File(main_file(root), "a") as file:
        del file["episode_0"]["observations"]["observation"]
        file["episode_0"]["observations"]["observation"] = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"episode 0: observations has shape"):
        read_minari(ID)


def test_no_output_and_no_change_of_random_state(capfd, recwarn):
    write(random_episodes())
    capfd.readouterr()
    recwarn.clear()
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    read_minari(ID)
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert capfd.readouterr() == ("", "")
    assert not recwarn


class Hub(BaseHTTPRequestHandler):
    """The part of Hugging Face's API that Minari uses, serving a folder ``namespace/dataset``."""

    folder: Path
    broken = False
    served: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.served.append(f"{self.command} {path}")
        if path == "/api/datasets":
            names = [each.name for each in self.folder.iterdir()]
            asked = parse_qs(url.query).get("search", [""])[0]
            self.answer([{"id": f"me/{name}"} for name in names if asked in name])
        elif path.startswith("/api/datasets/me/"):
            name, kind = path.removeprefix("/api/datasets/me/").split("/")[:2]
            files = [f for f in (self.folder / name).rglob("*") if f.is_file()]
            paths = [f.relative_to(self.folder / name).as_posix() for f in files]
            if kind == "tree":
                self.answer(
                    [
                        {"type": "file", "path": each, "size": f.stat().st_size, "oid": "0" * 40}
                        for each, f in zip(paths, files)
                    ]
                )
            else:
                siblings = [{"rfilename": each} for each in paths]
                self.answer({"id": f"me/{name}", "sha": "1" * 40, "siblings": siblings})
        else:
            name, _, _, file = path.removeprefix("/datasets/me/").split("/", 3)
            self.answer_file(self.folder / name / file)

    def answer(self, content):
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer_file(self, file: Path):
        if not file.is_file():
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif self.broken and file.name == "main_data.hdf5":
            self.reply(403, b"", {})
        else:
            tag = f'"{file.as_posix()}"'.replace("/", "-")
            self.reply(200, file.read_bytes(), {"ETag": tag, "X-Repo-Commit": "1" * 40})

    def reply(self, status, body, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, root, monkeypatch):
    """A remote that has ``ID``, with no local datasets."""
    constants = pytest.importorskip("huggingface_hub.constants")
    write(random_episodes())
    folder = tmp_path / "hub"
    root.rename(folder)
    (folder / "tiny" / "namespace_metadata.json").write_text(json.dumps({"datasets": [ID]}))
    handler = type("LocalHub", (Hub,), {"folder": folder, "served": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_REMOTE", "hf://me")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_download(hub, root, capfd):
    capfd.readouterr()
    data = read_minari(ID)
    assert capfd.readouterr().out == ""
    assert len(data.transitions) == len(kept(random_episodes()))
    assert main_file(root).read_bytes() == main_file(hub.folder).read_bytes()
    assert not list(root.glob(".*.lock"))
    hub.served.clear()
    again = read_minari(ID)
    assert (again.transitions == data.transitions).all()
    assert hub.served == []


def test_progress_bars_are_restored(hub):
    from huggingface_hub import utils

    utils.enable_progress_bars()
    read_minari(ID)
    assert not utils.are_progress_bars_disabled()


def test_concurrent_readers_wait_for_the_download(hub, root, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # two threads may restore it in the wrong order
    started, proceed = threading.Event(), threading.Event()
    rows: list[int] = []
    downloads: list[str] = []

    def slow_download(dataset_id):
        downloads.append(dataset_id)
        (root / dataset_id / "data").mkdir(parents=True)  # the state of a partial download
        started.set()
        assert proceed.wait(timeout=60)
        shutil.copytree(hub.folder, root, dirs_exist_ok=True)

    monkeypatch.setattr(minari, "download_dataset", slow_download)
    threads = [
        threading.Thread(target=lambda: rows.append(len(read_minari(ID).transitions)))
        for _ in range(2)
    ]
    threads[0].start()
    assert started.wait(timeout=60)
    threads[1].start()
    threads[1].join(timeout=0.5)
    assert threads[1].is_alive()
    proceed.set()
    for thread in threads:
        thread.join()
    assert rows == [len(kept(random_episodes()))] * 2
    assert downloads == [ID]


def test_unknown_ids(hub, root):
    write(random_episodes(), "tiny/steps-v1")
    with pytest.raises(
        FileNotFoundError,
        match=r"data\.path='tiny/step-v1' is not at .*hf://me.*'tiny/steps-v1'.*minari list remote",
    ):
        read_minari("tiny/step-v1")
    with pytest.raises(FileNotFoundError, match=r"no local ID is similar"):
        read_minari("elsewhere/unlike-anything-v7")
    assert not list(root.glob(".*.lock"))


def test_failed_download_leaves_no_files(hub, root):
    hub.broken = True
    with pytest.raises(OSError, match=rf"data\.path='{ID}'.*could not be downloaded from hf://me"):
        read_minari(ID)
    assert not (root / ID).exists()
    hub.broken = False
    assert len(read_minari(ID).transitions)


def test_offline(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=rf"data\.path='{ID}'.*could not be downloaded.*network"):
        read_minari(ID)


def test_unknown_remotes(hub, monkeypatch):
    monkeypatch.setenv("MINARI_REMOTE", "ftp://me")
    with pytest.raises(OSError, match=r"could not be downloaded from ftp://me.*MINARI_REMOTE"):
        read_minari(ID)


def test_local_datasets_need_no_remote(hub, root):
    shutil.copytree(hub.folder, root)
    read_minari(ID)
    assert hub.served == []


def test_episodes_end_with_their_first_termination():
    (each,) = random_episodes(shape=[(6, "truncated")])
    each["terminations"][[2, 3]] = True
    write([each])
    returns = read_minari(ID).episode_returns
    np.testing.assert_allclose(returns, [sum(each["rewards"][:3])], rtol=1e-5)


@pytest.mark.parametrize("number", [13, 37, 38])
def test_files_that_the_system_refuses_are_not_called_damaged(root, monkeypatch, number):
    write(random_episodes())

    def refuse(*args, **kwargs):
        raise OSError(number, "refused")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(OSError, match="cannot be read") as caught:
        read_minari(ID)
    assert ("HDF5_USE_FILE_LOCKING=FALSE" in str(caught.value)) == (number != 13)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_lock_left_in_a_read_only_folder_is_ignored(root, monkeypatch, number):
    write(random_episodes())
    name = ID.replace("/", ".")
    (root / f".{name}.lock").touch()

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pogo_torchrl.data.minari.hold", refuse)
    assert len(read_minari(ID).transitions) > 0
    (root / f".{name}.partial").touch()  # unless it is of a download that was killed
    with pytest.raises(OSError, match="cannot write to"):
        read_minari(ID)
