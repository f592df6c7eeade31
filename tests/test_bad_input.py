"""Invalid options, files and tensors, from tables and random: each gives a clear one-line error.

New cases are added as rows of the tables. Checkpoints of another run, task or chain length, full
disks and damaged checkpoints are tested in ``test_faults.py``, because they need real processes.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tensordict import TensorDict
from test_data import qlearning_dataset
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.transforms import DoubleToFloat

from pogo_torchrl import POGOLoss, make_actor, make_qvalue, sinkhorn_divergence
from pogo_torchrl.cli import main
from pogo_torchrl.data import make_replay_buffer, read_hdf5
from pogo_torchrl.data.hdf5 import UnsupportedFileError
from pogo_torchrl.experiments import config
from pogo_torchrl.experiments.overrides import check_options, check_overrides
from pogo_torchrl.experiments.run_folder import RunFolder, lock_run_folder

few = settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# ------------------------------------------------------------------------------------ options

# (command-line arguments, text of the error in addition to key and value of the first argument)
OPTIONS: list[tuple[str, str]] = [
    # names and syntax
    ("total_step=1", "did you mean total_steps"),
    ("lr", "write option=value"),
    ("lr=[", "write option=value"),
    ("data.path=a=b.hdf5", "quotes"),
    ("~lr", "write lr=VALUE"),
    ("+lr=1", "write lr=VALUE"),
    ("lr@env=1", "write lr=VALUE"),
    ("w2_weights=0.1,0.5", "write a list as [a,b]"),
    ("data={size:abc}", "data.OPTION=VALUE"),
    ("data={sise:1}", "data.OPTION=VALUE"),
    ("step_sizes=[1] w2_weights=[1]", "give one of the two"),
    # tasks
    ("task=hoper-medium", "hopper-medium-v2"),
    ("task=hopper-medium-v9", "hopper-medium-v2"),
    ("task=null", "did you mean"),
    # types
    ("total_steps=many", "an integer"),
    ("total_steps=1.5", "an integer"),
    ("total_steps=true", "an integer"),
    ("w2_weights=[a]", "a list of numbers"),
    ("w2_weights=[[1.0]]", "a list of numbers"),
    ("hidden_sizes=[[8]]", "a list of integers"),
    ("w2_weights=0.5", "a list of numbers"),
    ("w2_weights={a:1}", "a list of numbers"),
    ("w2_weights=null", "a list of numbers"),
    ("hidden_sizes=[1.5]", "a list of integers"),
    ("lr=abc", "a number"),
    ("lr=null", "a number"),
    ("lr=", "a number"),
    ("lr=[1]", "a number"),
    ("resume=perhaps", "true or false"),
    ("resume=7", "true or false"),
    ("device=[cpu]", "text"),
    ("env.max_episode_steps=long", "an integer or null"),
    ("data.path=[a]", "text or null"),
    ("lr=${nothing}", "nothing"),
    ("lr=${task}", "lr cannot be read"),
    ("lr=???", "lr cannot be read"),
    # values that are not finite, or out of range
    *[
        (f"{name}=nan", "must be finite")
        for name, _, hint, _ in config.iter_options()
        if hint in (float, float | None)
    ],
    *[
        (f"{name}={entry.metadata['lowest'] - 1}", "must be an integer")
        for name, entry, hint, _ in config.iter_options()
        if hint in (int, int | None)
    ],
    ("gamma=inf", "must be finite"),
    ("data.reward_shift=-inf", "must be finite"),
    ("batch_size=-5", "must be an integer"),
    ("seed=4294967296", "from 0 to 4294967295"),
    ("eval_episodes=1000000", "from 1 to 10000"),
    ("data.size=1000000000000", "from 1 to 100000000"),
    ("w2_weights=[]", "give 1 to 32"),
    (f"w2_weights=[{','.join(['0.5'] * 33)}]", "33 values"),
    ("w2_weights=[0.1,-0.5]", ">= 0"),
    ("w2_weights=[0.1,nan]", "finite"),
    ("hidden_sizes=[]", "give 1 to 32"),
    ("hidden_sizes=[256,0]", "must be an integer >= 1"),
    ("hidden_sizes=[10000000,10000000]", "this machine has"),
    ("num_samples=1000000000", "this machine has"),
    ("batch_size=100000000000", "this machine has"),
    ("lr=0", "positive"),
    ("lr=-1", "positive"),
    ("lr_actor=0", "lr_actor=0.0 must be a positive number"),
    ("lr_critic=-1", "lr_critic=-1.0 must be a positive number"),
    ("lr_actor=fast", "a number or null"),
    ("weight_decay=-0.1", ">= 0"),
    ("clip_grad_norm=0", "positive"),
    ("lr_schedule=exponential", "constant, linear, cosine"),
    ("lr_schedule_actor=steps", "lr_schedule_actor=steps is unknown"),
    ("w2_fraction=0", "in (0, 1]"),
    ("w2_fraction=2", "in (0, 1]"),
    ("gamma=1.5", "in [0, 1]"),
    ("gamma=-0.1", "in [0, 1]"),
    ("tau=0", "in (0, 1]"),
    ("tau=2", "in (0, 1]"),
    ("alpha=0", "> 0"),
    ("alpha=-1", "> 0"),
    ("displacement=0", "> 0"),
    ("alpha_growth=-1", "> 0"),
    ("freeze_critics_at=1.5", "in (0, 1)"),
    ("freeze_critics_at=-0.5", "in (0, 1)"),
    ("blur=0", "> 0"),
    ("blur=-0.05", "> 0"),
    ("policy_noise=-1", ">= 0"),
    ("noise_clip=-1", ">= 0"),
    # unknown choices
    ("device=gpu", "auto, cpu, cuda"),
    ("device=cuda:7", "CUDA_VISIBLE_DEVICES"),
    ("compile=maybe", "auto, true, false"),
    ("w2_backend=sinkorn", "tensorized"),
    ("q_normalization=mean", "mean_abs"),
    ("logger.backend=tensorbord", "tensorboard, wandb or null"),
    ("env.backend=gym", "mujoco, d4rl"),
    ("env.id=Hoper-v5", "gymnasium.make"),
    ("env.id=nothing:Hopper-v5", "gymnasium.make"),
    ("env.id=Blackjack-v1", "vectors"),
    ("env.id=CartPole-v1", "vectors"),
    ("data.source=csv", "local, d4rl, minari, hdf5"),
    # incompatible options
    ("data.source=hdf5", "data.path=FILE"),
    ("data.source=minari", "data.path=ID"),
    ("data.path=a.hdf5", "data.source=hdf5"),
    ("data.mirror=copy", "data.source=d4rl"),
    ("w2_backend=exact num_samples=11", "num_samples"),
    ("displacement=0.06 alpha_growth=2", "both change alpha"),
    ("task=antmaze-umaze-v2", "data source"),
    ("task=hopper-medium-v2 env.backend=d4rl env.max_episode_steps=5", "env.max_episode_steps"),
    ("batch_size=60 data.size=50", "transitions"),
    # files and folders; "file" is a file, "folder" is a folder
    ("log_dir=file", "log_dir"),
    ("log_dir=file/below", "log_dir"),
    ("checkpoint_dir=file", "checkpoint_dir"),
    ("checkpoint_dir=file/below", "checkpoint_dir"),
    ("data.cache_dir=file", "data.cache_dir"),
    ("data.path=folder data.source=hdf5", "is not a file"),
    ("data.path=missing.hdf5 data.source=hdf5", "is not a file"),
    ("data.path=file data.source=hdf5", "not a readable HDF5 file"),
    ("data.path='a b' data.source=minari", "namespace/name-vN"),
    ("data.mirror=folder data.source=d4rl", "hopper_medium"),
]

SMALL = ("data.size=50", "batch_size=8", "hidden_sizes=[4]", "total_steps=1", "progress_bar=false")


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """Working folder with one file and one folder; fails if a run starts to train or writes."""
    path = tmp_path / "work"
    path.mkdir()
    (path / "file").write_text("no data")
    (path / "folder").mkdir()
    monkeypatch.chdir(path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def train(self):
        raise AssertionError("training has started")

    monkeypatch.setattr("pogo_torchrl.experiments.run.POGOTrainer.train", train)
    yield path
    assert sorted(p.name for p in path.rglob("*")) == ["file", "folder"], "partial output"


def error_of(arguments: list[str], monkeypatch, capsys) -> str:
    """Run `pogo train` with invalid arguments; returns its error after checking the format."""
    names = [argument.partition("=")[0] for argument in arguments]
    small = [s for s in SMALL if s.partition("=")[0] not in names]
    monkeypatch.setattr(sys, "argv", ["pogo"])  # restored afterwards; the command sets it
    GlobalHydra.instance().clear()  # as in a new process
    with pytest.raises(SystemExit) as end:
        main(["train", *small, *arguments])
    lines = capsys.readouterr().err.splitlines(keepends=True)
    message = "".join(line for line in lines if "Generating" not in line).lstrip(
        "\r"
    )  # a progress bar
    assert end.value.code == 2, message
    assert message.startswith("pogo: "), message
    assert message.count("\n") == 1, message
    return message


@pytest.mark.parametrize(("line", "named"), OPTIONS, ids=[line for line, _ in OPTIONS])
def test_options(line, named, working_folder, monkeypatch, capsys):
    arguments = re.split(r" (?=[\w.]+=)", line)
    message = error_of(arguments, monkeypatch, capsys)
    assert named in message
    key, _, value = arguments[0].lstrip("~+").partition("=")
    assert key.partition("@")[0].split(".")[-1] in message
    if key in config.options() and len(arguments) == 1 and value[:1] not in ("$", "?"):
        assert re.split(r"[,{}]", value.strip("'{}"))[0] in message


def test_rejected_process_does_not_release_the_lock(tmp_path):
    root = tmp_path / "logs" / "run"
    folder = RunFolder(root / "training", root / "checkpoints")
    with lock_run_folder(folder):
        for _ in range(2):
            with (
                pytest.raises(FileExistsError, match="in use by another process"),
                lock_run_folder(folder),
            ):
                pass
            assert (root / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


# Values that are invalid for every option of a type.
INVALID = {
    int: st.sampled_from(["x", "1.5", "[1]", "null", "-3", "nan", "1e3", "{a:1}"]),
    float: st.sampled_from(["x", "[1.0]", "null", "nan", "inf", "-.inf", "{a:1}", "'1 2'"]),
    bool: st.sampled_from(["perhaps", "7", "1.0", "[true]", "null", "nan"]),
    str: st.sampled_from(["[a]", "{a:b}", "null"]),
    list[int]: st.sampled_from(["7", "[]", "[0]", "[x]", "[1.5]", "[[1]]", "null", "[-1]"]),
    list[int] | None: st.sampled_from(["7", "[]", "[0]", "[x]", "[1.5]", "[[1]]", "[-1]"]),
    list[float]: st.sampled_from(["0.5", "[]", "[x]", "[[1.0]]", "null", "[nan]", "[inf,1]"]),
    list[float] | None: st.sampled_from(["0.5", "[]", "[x]", "[[1.0]]", "[nan]", "[inf,1]"]),
    int | None: st.sampled_from(["x", "1.5", "0", "-1", "[1]"]),
    float | None: st.sampled_from(["x", "[1.0]", "nan", "inf", "-.inf", "{a:1}", "'1 2'"]),
    str | None: st.sampled_from(["[a]", "{a:b}"]),
    list[str] | None: st.sampled_from(["7", "text", "{a:b}"]),
    list[Any] | None: st.sampled_from(["7", "text", "{a:b}", "[]"]),
    dict[str, Any]: st.sampled_from(["x", "7", "[1]", "null"]),
}


def valid_values(name, entry, hint, default):
    """Strategy of values that pass the checks of types and ranges."""
    lowest, highest = entry.metadata["lowest"], entry.metadata["highest"]
    if hint in (int, int | None):
        return st.integers(lowest, highest or 10**9).map(str)
    if hint in (list[int], list[int] | None):
        return st.lists(st.integers(1, 10**9), min_size=1, max_size=32).map(str)
    if hint in (list[float], list[float] | None):
        return st.lists(
            st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=32
        ).map(str)
    if hint in (float, float | None):
        return st.floats(allow_nan=False, allow_infinity=False).map(str)
    if hint is bool:
        return st.sampled_from(["true", "false"])
    if hint == dict[str, Any]:
        return st.just("{a: 1, b: [text]}")
    if hint == list[str] | None:
        return st.just("[text, more]")
    if hint == list[Any] | None:
        return st.sampled_from(["[-1, 2]", "[[-1, -2], [1, 2]]"])
    return st.just("iql" if name == "algorithm" else "text")


ENTRIES = [entry for entry in config.iter_options() if entry[0] != "task"]


@st.composite
def overrides(draw):
    """Values of some options, at most one of them invalid, and the name of that option if any."""
    chosen = draw(
        st.lists(
            st.sampled_from(ENTRIES), min_size=1, max_size=5,
            # step_sizes and w2_weights exclude each other (test_options)
            unique_by=lambda e: "w2_weights" if e[0] == "step_sizes" else e[0],
        )
    )  # fmt: skip
    lines = [f"{entry[0]}={draw(valid_values(*entry))}" for entry in chosen]
    if draw(st.booleans()):
        name, _, hint, _ = chosen[0]
        return [f"{name}={draw(INVALID[hint])}", *lines[1:]], name
    return lines, None


def checked(lines: list[str]) -> None:
    """Apply the checks of types and ranges to a config, without the time Hydra takes."""
    check_overrides(lines)
    cfg = OmegaConf.structured(config.RunConfig)
    for override in OverridesParser.create().parse_overrides(lines):
        OmegaConf.update(cfg, override.key_or_group, override.value())
    check_options(cfg)


@few
@given(overrides())
def test_random_options_pass_or_are_named(drawn):
    lines, wrong = drawn
    if wrong is None:
        return checked(lines)
    with pytest.raises(ValueError, match=rf"^{re.escape(wrong)}\b.*[.)]$") as refused:
        checked(lines)
    assert "\n" not in str(refused.value)
    return None


@few
@given(st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=12))
def test_random_words_give_a_one_line_error(word):
    """Words that are not of the form key=value give a clear error."""
    if word.startswith("-"):
        return
    with pytest.raises(ValueError, match="--help") as caught:
        check_overrides([word.replace("=", "") + "x"])
    assert caught.type is ValueError


# ----------------------------------------------------------------------------------- datasets

ROWS, OBS, ACT = 12, 3, 2


def good_rows(seed: int = 0, dtype: str = "f8", timeouts: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = {
        "observations": (10 * rng.normal(size=(ROWS, OBS))),
        "actions": rng.integers(-1, 2, size=(ROWS, ACT)),
        "rewards": 10 * rng.normal(size=ROWS),
        "terminals": rng.random(ROWS) < 0.2,
        "timeouts": rng.random(ROWS) < 0.2,
    }
    if not timeouts:
        del rows["timeouts"]
    if np.dtype(dtype).kind == "u":
        rows = {key: np.abs(values) for key, values in rows.items()}
    return {key: values.astype(dtype) for key, values in rows.items()}


def write_rows(file: h5py.File, rows: dict[str, np.ndarray]) -> None:
    for key, values in rows.items():
        file[key] = values


def replace(file: h5py.File, key: str, values) -> None:
    del file[key]
    file[key] = values


MATRICES, COLUMNS = ("observations", "actions"), ("rewards", "terminals", "timeouts")
KEYS = (*MATRICES, *COLUMNS)
REQUIRED = KEYS[:-1]

# name: (keys it applies to, function that damages the file at a key)
DEFECTS = {
    "missing": (REQUIRED, lambda f, k: f.pop(k)),
    "a group": (KEYS, lambda f, k: (f.pop(k), f.create_group(k))),
    "scalar": (KEYS, lambda f, k: replace(f, k, 1.0)),
    "empty": (KEYS, lambda f, k: replace(f, k, h5py.Empty("f4"))),
    "no rows": (KEYS, lambda f, k: replace(f, k, f[k][:0])),
    "one row less": (KEYS, lambda f, k: replace(f, k, f[k][:-1])),
    "one row more": (
        KEYS,
        lambda f, k: replace(f, k, np.resize(f[k], (ROWS + 1, *f[k].shape[1:]))),
    ),
    "one axis more": (KEYS, lambda f, k: replace(f, k, np.zeros((ROWS, 2, 2)))),
    "no column": (KEYS, lambda f, k: replace(f, k, np.zeros((ROWS, 0)))),
    "a vector": (MATRICES, lambda f, k: replace(f, k, f[k][:, 0])),
    "a matrix": (COLUMNS, lambda f, k: replace(f, k, np.zeros((ROWS, 2)))),
    "bytes": (KEYS, lambda f, k: replace(f, k, np.full(f[k].shape, b"1"))),
    "strings": (
        KEYS,
        lambda f, k: replace(f, k, np.full(f[k].shape, "1", dtype=h5py.string_dtype())),
    ),
    "complex": (KEYS, lambda f, k: replace(f, k, f[k][()] + 1j)),
    "compound": (KEYS, lambda f, k: replace(f, k, np.zeros(f[k].shape, dtype=[("a", "f4")]))),
    "arrays": (KEYS, lambda f, k: f.pop(k) and f.create_dataset(k, (ROWS,), dtype="(2,)f4")),
    "ragged": (KEYS, lambda f, k: f.pop(k) and f.create_dataset(k, (ROWS,), h5py.vlen_dtype("f4"))),
    "references": (KEYS, lambda f, k: f.pop(k) and f.create_dataset(k, (ROWS,), h5py.ref_dtype)),
    **{
        name: (KEYS, lambda f, k, v=value: f[k].write_direct(corrupted(f[k], v)))
        for name, value in {
            "nan": math.nan,
            "inf": math.inf,
            "-inf": -math.inf,
            "huge": 1e200,
        }.items()
    },
}


def corrupted(array: h5py.Dataset, value: float) -> np.ndarray:
    values = array[()]
    values.reshape(-1)[np.random.default_rng(0).integers(values.size)] = value
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def read_error(path: Path) -> str:
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_hdf5(path)
    assert caught.type is UnsupportedFileError
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("defect", DEFECTS)
def test_defective_files(folder, defect):
    keys, damage = DEFECTS[defect]
    for key in keys:
        with h5py.File(folder / "bad.hdf5", "w") as file:
            write_rows(file, good_rows())
            damage(file, key)
        message = read_error(folder / "bad.hdf5")
        assert key in message or (key == "observations" and "does not match" in message), (
            key,
            message,
        )


@few
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["f2", "f4", "f8", ">f8", ">f4", "i1", "i4", ">i8", "u1", "u8", "?"]),
    st.booleans(),
    st.booleans(),
)
def test_valid_files_of_any_dtype_give_the_rows_of_d4rl(folder, seed, dtype, timeouts, chunked):
    rows = good_rows(seed, dtype, timeouts)
    expected = qlearning_dataset(rows, 5)
    with h5py.File(folder / "good.hdf5", "w") as file:
        for key, values in rows.items():
            file.create_dataset(key, data=values, compression="gzip" if chunked else None)
    if len(expected["reward"]) == 0:
        assert "no transition" in read_error(folder / "good.hdf5")
        return
    found = read_hdf5(folder / "good.hdf5", max_episode_steps=5).transitions
    for key, name in {
        "observation": "obs", "action": "action", ("next", "observation"): "next_obs",
        ("next", "reward"): "reward", ("next", "terminated"): "done",
    }.items():  # fmt: skip
        values = found[key].numpy()
        np.testing.assert_array_equal(values.reshape(expected[name].shape), expected[name])


@few
@given(st.data())
def test_random_layouts_with_one_defect(folder, data):
    keys, damage = DEFECTS[data.draw(st.sampled_from(sorted(DEFECTS)))]
    key = data.draw(st.sampled_from(keys))
    rows = good_rows(data.draw(st.integers(0, 99)), data.draw(st.sampled_from(["f4", "f8"])))
    with h5py.File(folder / "bad.hdf5", "w") as file:
        write_rows(file, rows)
        file["more/arrays"] = np.zeros(3)  # as D4RL's files have
        if rows[key].dtype == "f4" and damage is DEFECTS["huge"][1]:
            damage = DEFECTS["inf"][1]
        damage(file, key)
    read_error(folder / "bad.hdf5")


@few
@given(st.data())
def test_flipped_bytes_are_read_or_rejected(folder, data):
    with h5py.File(folder / "whole.hdf5", "w") as file:
        write_rows(file, good_rows())
    content = bytearray((folder / "whole.hdf5").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "flipped.hdf5").write_bytes(content)
    try:
        read_hdf5(folder / "flipped.hdf5")
    except ValueError as error:
        assert "flipped.hdf5" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("rows", "named"),
    [(0, "has 0 rows"), (1, "has 1 rows"), (2, "batch_size=8 exceeds the 1 transitions")],
)
def test_too_few_rows(folder, rows, named):
    with h5py.File(folder / "short.hdf5", "w") as file:
        write_rows(file, {key: values[:rows] for key, values in good_rows(timeouts=False).items()})
    with pytest.raises(ValueError, match=named):
        make_replay_buffer(
            "hopper-medium-v2", source="hdf5", path=folder / "short.hdf5", batch_size=8
        )


HOPPER = (11, 3)


@pytest.mark.parametrize(
    ("shape", "scale", "named"),
    [
        ((11, 2), 1.0, "size (11, 2), but task=hopper-medium-v2 has (11, 3)"),
        ((17, 6), 1.0, "size (17, 6), but task=hopper-medium-v2 has (11, 3)"),
        (HOPPER, 2.0, "actions up to 1 beyond the bounds of task=hopper-medium-v2 (-1 to 1)"),
        (HOPPER, 2.0, "in dimension 0: rescale them in the file, or clip them with data.clip_a"),
    ],
)
def test_data_of_another_environment(
    shape, scale, named, folder, working_folder, monkeypatch, capsys
):
    path = folder / "other.hdf5"
    with h5py.File(path, "w") as file:
        rows = {
            "observations": np.zeros((20, shape[0])),
            "actions": np.ones((20, shape[1])) * scale,
        }
        write_rows(file, rows | {"rewards": np.zeros(20), "terminals": np.zeros(20)})
    message = error_of(["data.source=hdf5", f"data.path={path}"], monkeypatch, capsys)
    assert f"data.path={path}" in message
    assert named in message


# ------------------------------------------------------------------------------------ tensors

SPEC = Bounded(low=-torch.ones(ACT), high=torch.ones(ACT))
NEXT = "next"


def f(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# (key, value or None to remove the key, expected text of the error)
BATCHES = [
    ("observation", None, "needs the key 'observation'"),
    ("action", None, "needs the key 'action'"),
    ((NEXT, "observation"), None, "needs the key ('next', 'observation')"),
    ((NEXT, "reward"), None, "needs the key ('next', 'reward')"),
    ("observation", f(8, OBS, dtype=torch.float64), "torch.float64, but the networks are"),
    ("action", f(8, ACT, dtype=torch.float64), "torch.float64, but the networks are"),
    ((NEXT, "reward"), f(8, 1, dtype=torch.float64), "torch.float64, but the networks are"),
    ("observation", f(8, OBS + 1), "this network expects [*B, 3]"),
    ((NEXT, "observation"), f(8, OBS + 1), "this network expects [*B, 3]"),
    ("action", f(8, 1), "actions of shape [*B, 2]"),  # would broadcast silently
    ("action", f(8, ACT + 1), "actions of shape [*B, 2]"),
    ((NEXT, "reward"), f(8), "must be (8, 1)"),
    ((NEXT, "reward"), f(8, 2), "must be (8, 1)"),
    ((NEXT, "terminated"), f(8, dtype=torch.bool), "must be (8, 1)"),
    ((NEXT, "terminated"), f(8, 1), "must be torch.bool"),
    ((NEXT, "done"), f(8, 1, dtype=torch.uint8), "must be torch.bool"),
    ((NEXT, "done"), f(8, 1), "must be torch.bool"),
]


@pytest.mark.parametrize(("key", "value", "named"), BATCHES, ids=[str(row[0]) for row in BATCHES])
def test_batches(make_batch, make_loss, key, value, named):
    batch = make_batch(8)
    batch = batch.exclude(key) if value is None else batch.set(key, value)
    with pytest.raises((KeyError, ValueError), match=re.escape(named)):
        make_loss()(batch)


def test_a_batch_without_rows(make_batch, make_loss):
    loss, nothing = make_loss(), make_batch(8)[:0]
    for function in (loss, loss.qvalue_loss, loss.actor_loss):
        with pytest.raises(ValueError, match=r"the batch has no rows \(.*shape.* \(0,"):
            function(nothing)


def test_a_batch_that_knows_no_ends(make_batch, make_loss):
    batch = make_batch().exclude((NEXT, "done"), (NEXT, "terminated"))
    loss = make_loss()
    with pytest.raises(KeyError, match=r"'done'\) or \('next', 'terminated'\).*at least one"):
        loss(batch)
    loss.actor_loss(batch)  # does not need them


@pytest.mark.parametrize("with_buffer", [False, True])
def test_the_advice_for_doubles_works(make_batch, make_loss, with_buffer):
    """`DoubleToFloat` leaves done and terminated as they are; batch.float() would not."""
    loss, batch = make_loss(), make_batch(8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"DoubleToFloat\(\)\(batch\).*append_transform"):
        loss(batch)
    if with_buffer:
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(8), batch_size=4)
        buffer.extend(batch)
        buffer.append_transform(DoubleToFloat())
        batch = buffer.sample()
    else:
        batch = DoubleToFloat()(batch)
    assert loss(batch)["loss_actor"].isfinite()


@pytest.mark.parametrize("key", ["observation", "action", (NEXT, "reward")])
def test_padded_rows_are_finite(make_batch, make_loss, key):
    batch, loss = make_batch(8), make_loss()
    batch["collector", "mask"] = torch.arange(8) < 5
    batch[key][5:] = 1e3
    for p in loss.qvalue_params():  # the loss follows the mask
        assert torch.autograd.grad(loss(batch)["loss_qvalue"], p)[0].isfinite().all()
    batch[key][5:] = math.nan
    with pytest.raises(ValueError, match=re.escape(f"{key!r} is not finite in padded rows")):
        loss(batch)
    loss.loss_mask_key = None  # no masks: what is in those rows is data
    loss.qvalue_loss(batch)


CALLS = {
    "no observation": (lambda a: a(TensorDict({"obs": f(4, OBS)}, [4])), "needs the key"),
    "observations too wide": (lambda a: a(observation=f(4, OBS + 1)), "expects [*B, 3]"),
    "a scalar": (lambda a: a(observation=f()), "expects [*B, 3]"),
    "doubles": (lambda a: a(observation=f(4, OBS, dtype=torch.float64)), "torch.float64"),
    "integers": (lambda a: a(observation=f(4, OBS, dtype=torch.int64)), "torch.int64"),
    "noise too wide": (lambda a: a(observation=f(4, OBS), noise=f(4, ACT + 1)), "'noise'"),
    "noise of others": (lambda a: a(observation=f(4, OBS), noise=f(5, ACT)), "'noise'"),
}


@pytest.mark.parametrize("name", CALLS)
def test_actor_inputs(name):
    call, named = CALLS[name]
    with pytest.raises((KeyError, ValueError), match=re.escape(named)):
        call(make_actor(OBS, SPEC, (4,)))


def loss(**settings) -> POGOLoss:
    return POGOLoss(make_actor(OBS, SPEC, (4,)), make_qvalue(OBS, ACT, (4,)), **settings)


CONSTRUCTORS = {
    "hidden_sizes": [
        call
        for h in ((), (0,), (-1,), (1.5,), ("8",), 8, None)
        for call in (lambda h=h: make_actor(OBS, SPEC, h), lambda h=h: make_qvalue(OBS, ACT, h))
    ],
    "observation_dim": [lambda n=n: make_actor(n, SPEC) for n in (0, -1, 1.5, None, True)],
    "action_dim": [lambda n=n: make_qvalue(OBS, n) for n in (0, -1, 1.5, None)],
    "action_spec": [
        lambda s=s: make_actor(OBS, s)
        for s in (None, Bounded(f(2), f(2)), Bounded(f(2), f(2) + math.inf), Bounded(0.0, 1.0, ()))
    ],
    "gamma": [
        lambda g=g: loss().make_value_estimator(gamma=g) for g in (-1, 1.1, math.nan, "a", None)
    ],
    "w2_weights": [
        lambda w=w: loss(w2_weights=w) for w in ((), (-1,), (math.nan,), "0.1", 0.1, None)
    ],
    "num_samples": [lambda k=k: loss(num_samples=k) for k in (0, -1, 1.5, True, "4", None)],
    "blur": [lambda b=b: loss(blur=b) for b in (0, -1, math.nan, math.inf, "a", None)],
    "alpha": [lambda a=a: loss(alpha=a) for a in (0, -1, math.nan, math.inf, "a", None)],
    "policy_noise": [lambda s=s: loss(policy_noise=s) for s in (-1, math.nan, "a", None)],
    "w2_backend": [lambda n=n: loss(w2_backend=n) for n in ("fats", "", None, 3)],
    "bounds": [
        lambda b=b: loss(bounds=b) for b in ((1, -1), (0, 0), (-1, math.inf), (math.nan, 1))
    ],
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_arguments(name):
    for call in CONSTRUCTORS[name]:
        with pytest.raises(ValueError, match=name):
            call()


@few
@given(
    st.lists(st.integers(0, 3), max_size=4), st.lists(st.integers(0, 3), max_size=4),
    *[st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool])] * 2,
    st.sampled_from(["tensorized", "fast", "exact"]),
)  # fmt: skip
def test_point_clouds_are_measured_or_rejected(x, y, x_dtype, y_dtype, backend):
    fits = (
        len(x) >= 2 and len(x) == len(y) and x[:-2] == y[:-2] and x[-1] == y[-1] > 0
        and x_dtype == y_dtype and x_dtype.is_floating_point and min(x[-2], y[-2]) > 0
        and (backend != "exact" or x[-2] == y[-2])
    )  # fmt: skip
    clouds = torch.ones(x, dtype=x_dtype), torch.zeros(y, dtype=y_dtype)
    if fits:
        assert list(sinkhorn_divergence(*clouds, backend=backend).shape) == x[:-2]
        return
    with pytest.raises(ValueError, match=r"sinkhorn_divergence|w2_backend"):
        sinkhorn_divergence(*clouds, backend=backend)


def test_tables_have_no_duplicates_and_cover_every_type():
    assert len({line for line, _ in OPTIONS}) == len(OPTIONS)
    assert {hint for _, _, hint, _ in config.iter_options()} == set(INVALID)
