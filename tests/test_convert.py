"""Tests of ``pogo convert``."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pogo_torchrl.cli import main
from pogo_torchrl.data import convert, read_hdf5

ROWS = 30


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    ends = np.arange(ROWS) % 10 == 9
    return {
        "obs": rng.normal(size=(ROWS, 3)),
        "act": rng.uniform(-1, 1, size=(ROWS, 2)),
        "reward": rng.normal(size=ROWS),
        "terminated": ends & (np.arange(ROWS) < 10),
        "truncated": ends & (np.arange(ROWS) >= 10),
    }


def write_csv(path: Path, rows: dict[str, np.ndarray]) -> None:
    columns = {}
    for key, values in rows.items():
        if values.ndim == 2:
            columns |= {f"{key}_{i}": values[:, i] for i in range(values.shape[1])}
        else:
            columns[key] = values
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values()))]
    path.write_text("\n".join(lines) + "\n")


def write(path: Path, rows: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        np.savez_compressed(path, **rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps({key: values.tolist() for key, values in rows.items()}))
    elif path.suffix == ".safetensors":
        save_file(rows, path)
    else:
        write_csv(path, rows)
    return path


def expected(tmp_path: Path):
    with h5py.File(tmp_path / "expected.hdf5", "w") as file:
        names = ("observations", "actions", "rewards", "terminals", "timeouts")
        for name, values in zip(names, arrays().values()):
            file[name] = values
    return read_hdf5(tmp_path / "expected.hdf5")


@pytest.mark.parametrize("suffix", ["npz", "json", "safetensors", "csv"])
def test_command(tmp_path, capsys, suffix):
    source, output = write(tmp_path / f"log.{suffix}", arrays()), tmp_path / "log.hdf5"
    main(["convert", str(source), str(output)])
    assert capsys.readouterr().out == (
        f"{output}: 28 transitions, 3 episodes; observations of size 3, actions of size 2; use "
        f"data.source=hdf5 data.path={output}\n"
    )
    data, reference = read_hdf5(output), expected(tmp_path)
    assert (data.transitions == reference.transitions).all()
    np.testing.assert_array_equal(data.episode_returns, reference.episode_returns)
    with pytest.raises(SystemExit) as end:
        main(["convert", str(source), str(output)])
    assert end.value.code == 2
    assert "exists: delete it" in capsys.readouterr().err


def test_other_types_of_files_are_to_be_converted(tmp_path):
    (tmp_path / "log.npz").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"pogo convert .*log\.npz .*log\.hdf5"):
        read_hdf5(tmp_path / "log.npz")


@pytest.mark.parametrize("name", ["log.pkl", "log.npy", "log.PT"])
def test_the_advice_for_a_pickle_is_what_convert_accepts(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    for read in (read_hdf5, lambda path: convert(path, tmp_path / "log.hdf5")):
        with pytest.raises(ValueError, match=rf"{name} is or may be pickled.*numpy\.savez"):
            read(tmp_path / name)


def test_dictionary(tmp_path):
    path, data = convert({**arrays(), "rewards": arrays()["reward"]}, tmp_path / "log.h5")
    assert (data.transitions == expected(tmp_path).transitions).all()
    with h5py.File(path) as file:
        assert {"reward", "rewards", "observations"} <= set(file)


def test_csv_of_single_transitions_with_scalars(tmp_path):
    source = tmp_path / "log.csv"
    source.write_text(
        "\ufeffobs[0],obs[1],action,reward,next_obs[1],next_obs[0],terminated\n"
        "0,1,0.5,1,3,2,False\n4,5,-0.5,1,7,6,TRUE\n"
    )
    data = convert(source, tmp_path / "log.hdf5").data.transitions
    assert data["observation"].tolist() == [[0, 1], [4, 5]]
    assert data["next", "observation"].tolist() == [[2, 3], [6, 7]]
    assert data["action"].tolist() == [[0.5], [-0.5]]
    assert data["next", "terminated"].flatten().tolist() == [False, True]


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("name", ["a.pkl", "a.npz", "b.npz", "a.npy", "a.pt", "a.joblib"])
def test_pickles_are_refused_and_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content = {**arrays(), "infos": [Evil()]}
    if name == "a.npz":
        np.savez(name, **{**content, "infos": np.array(content["infos"], dtype=object)})
    elif name == "a.npy":
        np.save(name, np.array(content, dtype=object))
    elif name == "a.pt":
        torch.save(content, name)
    else:
        Path(name).write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=rf"{name}.*can run any code that its author put in"):
        convert(name, "out.hdf5")
    assert not Path("executed").exists()
    assert not Path("out.hdf5").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"no", "not a readable .npz"),
        ("a.npz", b"", "not a readable .npz"),
        ("a.json", b"[1, 2]", "holds a list"),
        ("a.json", b'{"obs": ', "not a readable .json"),
        ("a.json", b"[" * 100_000, "not a readable .json"),
        ("a.json", b'{"obs": [[1], [1, 2]]}', "obs is not an array"),
        ("a.json", b'{"obs": ["x", "y"]}', "obs has dtype"),
        ("a.json", b'{"obs": [1, 2], "": [1, 2]}', "'' is not a name of an array"),
        ("a.json", b'{"a": [1, 2], "a/b": [1, 2]}', "'a/b' is not a name of an array"),
        ("a.safetensors", b"no", "not a readable .safetensors"),
        ("a.csv", b"", "name of its own"),
        ("a.csv", b"obs,obs\n1,2\n", "name of its own"),
        ("a.csv", b"obs_0,obs_2\n1,2\n", r"numbered \[0, 2\]"),
        ("a.csv", b"obs,reward\n1,2\n1\n", "row 3 has 1 values"),
        ("a.csv", b"obs,date\n1,2024-01-01\n", "date='2024-01-01', which is not a number"),
        ("a.csv", b"\xff\xfe\x00", "not a readable .csv"),
        ("a.csv", b"obs,action,reward,terminated\n1,1,1,0\n", "1 rows; at least 2"),
        ("a.csv", b"obs,action,reward,terminated\n1,1,1,0\nnan,1,1,0\n", "not finite"),
        ("a.csv", b"obs,action,reward\n1,1,1\n1,1,1\n", "lacks terminals"),
        ("a.txt", b"1 2 3", "not of a supported type; convert one of .npz"),
        ("a.hdf5", b"", "already: use data.source=hdf5"),
    ],
)
def test_files_that_cannot_be_converted(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        convert(tmp_path / name, tmp_path / "out.hdf5")
    assert "\n" not in str(error.value)
    assert name in str(error.value)
    assert not (tmp_path / "out.hdf5").exists()


def test_small_files_that_declare_huge_arrays(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,), }"
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("obs.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ValueError, match=r"a\.npz"):
        convert(tmp_path / "a.npz", tmp_path / "out.hdf5")


def test_bad_arguments(tmp_path, capsys):
    source = write(tmp_path / "log.npz", arrays())
    with pytest.raises(ValueError, match=r"must end in \.hdf5, e\.g\. .*log\.hdf5"):
        convert(source, tmp_path / "log.csv")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        convert(tmp_path / "none.npz", tmp_path / "log.hdf5")
    with pytest.raises(OSError, match="cannot write to"):
        convert(source, tmp_path / "none" / "log.hdf5")
    with pytest.raises(SystemExit) as end:
        main(["convert", str(source)])
    assert end.value.code == 2
    assert "write pogo convert INPUT OUTPUT.hdf5" in capsys.readouterr().err
    main(["convert", "--help"])
    assert "pogo convert INPUT OUTPUT.hdf5" in capsys.readouterr().out
