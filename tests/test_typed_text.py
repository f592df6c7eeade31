"""Text options keep what was typed; `~` and environment variables are expanded in paths."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pogo_torchrl.cli import main
from pogo_torchrl.experiments import config
from pogo_torchrl.experiments.evaluate import EvaluateConfig
from pogo_torchrl.experiments.overrides import compose, parse_options, sweep_options
from pogo_torchrl.experiments.sweep_file import read_sweep
from pogo_torchrl.experiments.typed_text import keep_text

TYPED = [
    "2024_11_28", "2024-11-28", "1.10", "1e3", "007", "0x10", "nan", "no", "on", "true", "None",
    "a b (1)", "a:b", "it's", "a#b", "C:\\data\\new", "ends\\", "ü;&!@%",
]  # fmt: skip


@pytest.mark.parametrize("text", TYPED)
def test_text_on_the_command_line(text):
    assert compose([f"log_dir={text}"]).log_dir == text
    assert compose([f"data.path={text}", "data.source=hdf5"]).data.path == text
    options, others = sweep_options([f"results_dir={text}", f"data.path={text}"])
    assert (options.results_dir, others) == (text, [f"data.path={text}"])
    assert parse_options([f"video={text}"], EvaluateConfig()).video == text


@pytest.mark.parametrize("text", [t for t in TYPED if not {":", "#", "@"} & set(t)])
def test_text_in_sweep_files(tmp_path, text):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"common: {{log_dir: {text}, seeds: [0], lr: 3e-4, total_steps: 1_000}}\n"
        f"environments: {{hopper: {{medium: {{data: {{path: {text}}}, compile: false}}}}}}\n",
        encoding="utf-8",
    )
    (run,) = read_sweep(str(file))
    assert (run.cfg.log_dir, run.cfg.data.path) == (text, text)
    assert (run.cfg.lr, run.cfg.total_steps) == (3e-4, 1000)  # numbers are numbers
    assert compose(run.arguments).log_dir == text  # as its worker reads them


def test_null_and_numbers_stay_what_they_are(tmp_path):
    assert compose(["data.path=null", "q_normalization=null"]).q_normalization is None
    assert compose(["lr=1e-3"]).lr == 1e-3
    file = tmp_path / "sweep.yaml"
    file.write_text("common: {seeds: [0], data: {path: null}}\nenvironments: {hopper: {medium: }}")
    assert read_sweep(str(file))[0].cfg.data.path is None


def test_several_texts_of_a_multirun():
    assert keep_text(["-m", "log_dir=1.10,1e3"]) == ["-m", "log_dir='1.10','1e3'"]
    for argument in ("log_dir=a,b", "log_dir=choice(a,b)", "log_dir='a,b'", "lr=1e3"):
        assert keep_text([argument]) == [argument]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))  # HOME on Windows
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NIX", raising=False)
    return tmp_path


@dataclass
class Commands:
    """Options of the commands report and check-dataset."""

    log_dir: str = config.option("logs", "", path=True)


WRITTEN = {"~/a": "home/a", "$SCRATCH/a": "scratch/a", "${SCRATCH}a": "scratcha"}


@pytest.mark.parametrize("text", WRITTEN)
def test_paths_are_expanded(home, text):
    meant = str(home / WRITTEN[text])
    names = {name for name, entry, *_ in config.iter_options() if entry.metadata["path"]}
    assert names == {"log_dir", "checkpoint_dir", "data.path", "data.mirror", "data.cache_dir"}
    cfg = compose([f"{name}={text}" for name in sorted(names)])
    assert {cfg.log_dir, cfg.checkpoint_dir, *(cfg.data[n] for n in ("path", "mirror"))} == {meant}
    options, _ = sweep_options([f"sweep={text}", f"results_dir={text}"])
    assert (options.sweep, options.results_dir) == (meant, meant)
    cfg = parse_options([text, f"video={text}"], EvaluateConfig(), "policy")
    assert (cfg.policy, cfg.video) == (meant, meant)
    file = home / "sweep.yaml"
    file.write_text(
        f"common: {{seeds: [0], log_dir: '{text}', data: {{cache_dir: '{text}'}}}}\n"
        "environments: {hopper: {medium: }}"
    )
    (run,) = read_sweep(str(file))
    assert (run.cfg.log_dir, run.cfg.data.cache_dir) == (meant, meant)
    assert run.name.startswith("hopper-medium-v2/")


def test_report_and_check_expand_paths(home, capsys):
    for command in (["report", "log_dir=~/none"], ["check-dataset", "~/none"]):
        with pytest.raises(SystemExit, match="2"):
            main(command)
        assert str(home / "home" / "none") in capsys.readouterr().err


def test_urls_and_existing_names_stay(home, monkeypatch):
    url = "https://example.org/~me/$NIX"
    assert compose([f"data.mirror={url}"]).data.mirror == url
    monkeypatch.chdir(home)
    (home / "$NIX").mkdir()
    assert compose(["log_dir=$NIX"]).log_dir == "$NIX"


@pytest.mark.parametrize("text", ["$NIX/a", "$SCRATCH/$NIX"])
def test_variables_that_are_not_set(home, text):
    for read in (
        lambda: compose([f"log_dir={text}"]),
        lambda: parse_options([f"log_dir={text}"], Commands()),
    ):
        with pytest.raises(ValueError, match=r"log_dir=.*the environment variable NIX is not set"):
            read()
