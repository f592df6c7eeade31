"""Reports over many runs, from synthetic run folders with known scores."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from runs import run_folder, train

from pogo_torchrl.cli import main
from pogo_torchrl.report import Estimate, bootstrap, iqm, read_runs, spread, write_report
from pogo_torchrl.report.content import chain_table, scores_table, weights_table
from pogo_torchrl.report.figures import (
    chain_figure,
    curves_figure,
    intervals_figure,
    published_figure,
    weights_figure,
)
from pogo_torchrl.report.intervals import mean
from pogo_torchrl.report.published import ALGORITHMS, GROUP_MEANS, PER_TASK
from pogo_torchrl.report.study import best_settings, group_scores, groups, settings
from pogo_torchrl.report.tables import Table

HOPPER, CHEETAH, MAZE = "hopper-medium-v2", "halfcheetah-medium-v2", "antmaze-umaze-v2"
MODES = ("deterministic", "stochastic")


def make_run(
    logs: Path, task: str, weights: tuple[float, ...], seed: int, curves: np.ndarray, **options
) -> Path:
    """Make a run folder with scores ``[T, N, 2]`` at steps 10, 20, ...; returns are tenfold."""
    name = "w2_" + "_".join(f"{w:g}" for w in weights)
    folder = logs / task / name / f"seed_{seed}"
    training = folder / "training"
    training.mkdir(parents=True)
    total = options.get("total", 10 * len(curves))
    config = {
        "task": task, "seed": seed, "w2_weights": list(weights), "total_steps": total,
        "data": {"source": options.get("source", "d4rl")},
        **({"algorithm": options["algorithm"]} if "algorithm" in options else {}),
    }  # fmt: skip
    (training / "config.yaml").write_text(yaml.safe_dump(config))
    lines = ["step,actor,mode,return_mean,return_std,score,episode_length,seconds"]
    for t, actor, m in np.ndindex(*curves.shape):
        score = float(curves[t, actor, m])
        lines.append(f"{10 * (t + 1)},{actor},{MODES[m]},{10 * score},1.0,{score},9,0.1")
    (training / "evaluations.csv").write_text("\n".join(lines) + "\n")
    (training / "train.log").write_text(
        "2026-01-01 00:00:00,000 Data: 99 transitions, 3 episodes, mean D4RL score 23.4\n"
    )
    if options.get("done", True):
        (folder / "done.json").write_text(json.dumps({"total_steps": total}))
    return folder


def constant(*actors: float, steps: int = 1) -> np.ndarray:
    """Curves of actors with constant scores, lower by one in stochastic mode."""
    return np.array([[[a, a - 1.0] for a in actors]] * steps)


def make_study(logs: Path) -> Path:
    """Make runs of a task with two settings, and of a task with shorter chains."""
    for seed, score in enumerate((10.0, 20.0, 60.0)):
        make_run(logs, HOPPER, (0.2, 0.2), seed, constant(5.0, score, steps=2))
    for seed, score in enumerate((50.0, 54.0)):
        curves = constant(40.0, score, steps=2)
        curves[0, 1] += 30  # the best checkpoint is not the last one
        make_run(logs, HOPPER, (0.2, 0.3), seed, curves)
        make_run(logs, CHEETAH, (1.0,), seed, constant(-score))
    return logs


@pytest.fixture
def logs(tmp_path):
    """The run folders of a study; tests may modify them."""
    return make_study(tmp_path / "logs")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The report of the same study, shared by tests that only read it."""
    folder = tmp_path_factory.mktemp("study")
    return write_report(make_study(folder / "logs"), folder / "results").parent


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------- statistics


def test_spread_by_hand():
    assert spread([1.0, 2.0, 6.0]) == (3.0, math.sqrt((4 + 1 + 9) / 2))


@pytest.mark.parametrize("n", range(1, 14))
def test_iqm_is_scipys_trimmed_mean(n):
    stats = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(n).normal(size=(3, n))
    np.testing.assert_allclose(iqm(x), stats.trim_mean(x, 0.25, axis=-1), rtol=1e-12)


def test_iqm_by_hand():
    # of nine values, two are dropped at each end
    assert iqm([100, -100, 1, 2, 3, 4, 5, 99, -99]) == pytest.approx(3.0)


def test_bootstrap_interval_against_all_resamples():
    """With two and three runs there are 4 x 27 resamples, all equally likely."""
    first, second = [0.0, 10.0], [20.0, 50.0, 90.0]
    exact = [np.mean([*a, *b]) for a in product(first, repeat=2) for b in product(second, repeat=3)]
    found = bootstrap([first, second], mean)
    assert found.value == 34.0
    # quantiles of the resamples are close to those of the full distribution
    for bound, p in ((found.low, 0.025), (found.high, 0.975)):
        assert np.mean(np.array(exact) < bound - 1e-9) <= p + 0.005
        assert np.mean(np.array(exact) <= bound + 1e-9) >= p - 0.005


def test_bootstrap_resamples_within_each_task():
    # tasks differ, the runs of a task do not
    assert bootstrap([[0.0] * 4, [100.0] * 4]) == Estimate(50.0, 50.0, 50.0)


def test_bootstrap_is_deterministic():
    x = [np.random.default_rng(0).normal(size=5)]
    assert bootstrap(x) == bootstrap(x)


# ------------------------------------------------------------------------------- summary.csv


def test_summary_has_a_row_for_each_actor_and_mode(results):
    rows = read_csv(results / "summary.csv")
    keys = [tuple(r[k] for k in ("task", "w2_weights", "seed", "actor", "mode")) for r in rows]
    assert len(set(keys)) == len(keys) == (3 + 2) * 2 * 2 + 2 * 1 * 2
    row = rows[keys.index((HOPPER, "0.2_0.3", "1", "1", "stochastic"))]
    assert row == {
        "task": HOPPER, "w2_weights": "0.2_0.3", "seed": "1", "actor": "1", "mode": "stochastic",
        "last_step": "20", "last_score": "53.0000", "last_return": "530.0000", "best_step": "10",
        "best_score": "83.0000", "status": "done", "data_score": "23.4",
        "weights": "raw", "best_return": "830.0000",
    }  # fmt: skip


def test_a_run_without_evaluations_has_empty_cells(tmp_path):
    folder = make_run(tmp_path / "logs", HOPPER, (0.5,), 3, constant(1.0), total=500, done=False)
    (folder / "training" / "evaluations.csv").unlink()
    (folder / "training" / "metrics.csv").write_text("step,loss\n250,0.5\n300,0.")
    page = write_report(tmp_path / "logs", tmp_path / "results").read_text()
    first, second = read_csv(tmp_path / "results" / "summary.csv")
    assert (first["last_step"], first["best_score"], first["status"]) == ("", "", "250 of 500")
    assert (first["mode"], second["mode"]) == MODES
    assert f"* `{HOPPER}/w2_0.5/seed_3`: 250 of 500; no evaluation yet" in page


# ------------------------------------------------------------------------------- tables


def test_scores_table_by_hand(logs):
    table = scores_table(settings(read_runs(logs)[0]))
    rows = {(r[0], r[1], r[2]): r[3:] for r in table.rows}
    assert table.columns[5:] == tuple(
        f"{which} checkpoint, {mode}" for which in ("last", "best") for mode in MODES
    )
    seeds, step, *scores = rows[HOPPER, "0.2, 0.2", 1]
    assert (seeds, step) == (3, "20")
    std = math.sqrt((20**2 + 10**2 + 30**2) / 2)
    assert scores[0] == pytest.approx((30.0, std))
    assert scores[1] == pytest.approx((29.0, std))
    _, _, last, _, best, _ = rows[HOPPER, "0.2, 0.3", 1]
    assert (last.mean, best.mean) == (52.0, 82.0)


def test_chain_differences_are_paired_by_run(logs):
    rows = {(r[0], r[1], r[3]): r[4:] for r in chain_table(settings(read_runs(logs)[0])).rows}
    gain, total = rows[HOPPER, "0.2, 0.3", "deterministic"]
    assert gain == total == pytest.approx((12.0, math.sqrt(8)))
    assert (CHEETAH, "1", "deterministic") not in rows  # a single actor has no predecessor


def test_best_weights_are_chosen_by_the_last_checkpoint(logs):
    found = settings(read_runs(logs)[0])
    assert [s.label for s in best_settings(found)] == ["1", "0.2, 0.3"]
    table = weights_table(found)
    ranked = [(*r[1:3], r[5]) for r in table.rows if r[0] == HOPPER]
    assert ranked == [(1, "0.2, 0.3", 0.0), (2, "0.2, 0.2", 22.0)]
    assert "selection on test returns" in table.full_caption


def test_groups_with_the_same_tasks_are_reported_once(tmp_path):
    logs = tmp_path / "logs"
    for task in (HOPPER, "hopper-medium-expert-v2", CHEETAH):
        make_run(logs, task, (1.0,), 0, constant(10.0))
    found = groups(settings(read_runs(logs)[0]))
    # locomotion has the same tasks as "all tasks"
    assert {k: len(v) for k, v in found.items()} == {"all tasks": 3, "hopper": 2, "halfcheetah": 1}
    make_run(logs, MAZE, (1.0,), 0, constant(10.0))
    found = groups(settings(read_runs(logs)[0]))
    assert (len(found["all tasks"]), len(found["locomotion"]), len(found["antmaze"])) == (4, 3, 1)


def test_group_scores_by_hand(logs):
    scores = group_scores(best_settings(settings(read_runs(logs)[0])))
    rows = {(s.group, s.actor, s.mode): s for s in scores}
    both = rows["all tasks", "last", "deterministic"]
    assert (both.tasks, both.runs) == (2, 4)
    assert both.last_mean.value == 0.0  # of -50, -54, 50, 54
    assert both.last_iqm.value == 0.0
    assert both.best_mean.value == 15.0
    assert -4 <= both.last_mean.low < 0 < both.last_mean.high <= 4
    assert ("all tasks", "0", "deterministic") not in rows  # the shortest chain has one actor
    assert rows["hopper", "0", "stochastic"].last_iqm == Estimate(39.0, 39.0, 39.0)


def test_latex_is_escaped_and_balanced(results):
    for path in (results / "tables").glob("*.tex"):
        text = path.read_text()
        first, *lines = text.splitlines()
        assert first == r"% \usepackage{booktabs}"
        assert text.isascii()
        assert re.findall(r"(?<!\\)[&%#_^~]", re.sub(r" & ", "", "\n".join(lines))) == []
        assert text.count("$") % 2 == 0
        assert text.count("{") == text.count("}")
        columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
        rows = [line for line in lines if line.endswith(r" \\")]
        assert {line.count(" & ") + 1 for line in rows} == {len(columns)}


def test_latex_special_characters_are_escaped():
    row = (r"a&b%c$d#e_f{g}h~i^j\k",)
    tex = Table("t", "c", ("x",), [row]).latex()
    escaped = r"a\&b\%c\$d\#e\_f\{g\}h\textasciitilde{}i\textasciicircum{}j\textbackslash{}k"
    assert f"    {escaped} \\\\" in tex.splitlines()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(results, tmp_path):
    shutil.copytree(results / "tables", tmp_path / "tables")
    inputs = "\n".join(rf"\input{{{path.name}}}" for path in (results / "tables").glob("*.tex"))
    (tmp_path / "tables" / "all.tex").write_text(
        rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{inputs}\end{{document}}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
        cwd=tmp_path / "tables", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


# ------------------------------------------------------------------------------- damaged files


def test_a_report_of_an_unfinished_study(logs, tmp_path):
    cut = make_run(logs, MAZE, (0.5, 0.5), 0, constant(1.0, 2.0, steps=3), total=100, done=False)
    evaluations = cut / "training" / "evaluations.csv"
    evaluations.write_text(evaluations.read_text()[:-70])  # truncate the last evaluation
    failed = logs / HOPPER / "w2_0.2_0.2" / "seed_2"
    (failed / "done.json").unlink()
    (failed / "failed.json").write_text(json.dumps({"error": "disk full", "exit_code": 2}))
    broken = make_run(logs, MAZE, (0.5, 0.5), 1, constant(1.0, 2.0))
    (broken / "training" / "config.yaml").write_text("task: [")
    (logs / MAZE / "w2_0.5_0.5" / "seed_2").mkdir()
    (logs / MAZE / "w2_0.5_0.5" / "seed_2" / "failed.json").write_text('{"error": "no data"}')

    page = write_report(logs, tmp_path / "results").read_text()
    where = f"* `{MAZE}/w2_0.5_0.5/seed_"
    problems = page.partition("## Unfinished, failed and damaged runs\n\n")[2].partition("\n\n")[0]
    assert sorted(problems.splitlines()) == sorted([
        f"{where}0`: 20 of 100; evaluations.csv: 1 damaged row skipped, "
        "1 incomplete evaluation skipped",
        f"{where}1`: training/config.yaml cannot be read: it is damaged",
        f"{where}2`: failed: no data",
        f"* `{HOPPER}/w2_0.2_0.2/seed_2`: failed at 20 of 20; disk full",
    ])  # fmt: skip
    assert (
        "8 runs (3 tasks, 4 combinations of task and w2_weights): 6 done, 1 unfinished, 1 failed"
        in (page)
    )
    rows = read_csv(tmp_path / "results" / "summary.csv")
    assert {r["last_step"] for r in rows if r["task"] == MAZE} == {"20"}


HEADER = b"step,actor,mode,return_mean,return_std,score,episode_length,seconds\n"
ROW = b"10,0,deterministic,1,1,5.5,9,0.1\n10,0,stochastic,1,1,5.25,9,0.1\n"


@pytest.mark.parametrize(
    ("content", "complete"),
    [
        (b"", 0),
        (HEADER, 0),
        (HEADER[:20], 0),
        (b"\x00\xff\xfe" * 100, 0),
        (b"\x00\xff\xfe\n" * 100, 0),
        (b"step,actor\n1,2\n", 0),
        (HEADER + ROW, 1),
        (HEADER + ROW[:-1], 0),  # the last number may be truncated
        (HEADER + ROW + b"20,0,deter", 1),
        (HEADER + ROW + b"20,0,deterministic,1,1,nan,9,0.1\n20,0,stochastic,1,1,5,9,0.1\n", 1),
        (HEADER + ROW + b"twenty,0,deterministic,1,1,6,9,0.1\n", 1),
        (HEADER + ROW + b"20,7,deterministic,1,1,6,9,0.1\n", 1),  # no such actor
        (HEADER + ROW + b"20,0,deterministic,1,1,6,9,0.1,8,8,8\n", 1),
        (HEADER + b'"' + b"x" * 200_000 + b"\n" + ROW, 1),  # longer than the field limit of csv
        (HEADER + ROW + ROW, 1),
    ],
)
def test_damaged_evaluations_never_crash(tmp_path, content, complete):
    folder = make_run(tmp_path / "logs", HOPPER, (0.5,), 0, constant(1.0))
    (folder / "training" / "evaluations.csv").write_bytes(content)
    (run,), _ = read_runs(tmp_path / "logs")
    assert len(run.evaluations.steps) == complete
    if complete:
        assert run.last.tolist() == [[5.5, 5.25]]
    clean = content in (b"", HEADER, HEADER + ROW, HEADER + ROW + ROW)
    assert bool(run.evaluations.damage) != clean


@pytest.mark.parametrize(
    "config",
    ["", "7", "[]", "task: x", "task: x\nseed: 0\nw2_weights: []\ntotal_steps: 1", "\x00", "a: !b",
     "task: x\nseed: 0\nw2_weights: 3\ntotal_steps: 1",
     "task: x\nseed: 0\nw2_weights: [a]\ntotal_steps: 1",
     "task: x\nseed: 0\nw2_weights: [1]\ntotal_steps: 1\ndata: 5"],
)  # fmt: skip
def test_a_folder_with_a_damaged_config_is_skipped(tmp_path, config):
    folder = make_run(tmp_path / "logs", HOPPER, (0.5,), 0, constant(1.0))
    (folder / "training" / "config.yaml").write_text(config)
    runs, left_out = read_runs(tmp_path / "logs")
    assert runs == []
    assert "cannot be read" in left_out[f"{HOPPER}/w2_0.5/seed_0"]


def test_a_study_without_readable_runs(tmp_path):
    folder = make_run(tmp_path / "logs", HOPPER, (0.5,), 0, constant(1.0))
    (folder / "training" / "config.yaml").write_text("")
    page = write_report(tmp_path / "logs", tmp_path / "results").read_text()
    assert "0 runs" in page
    assert "1 folder could not be read" in page


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"total_steps": "many"}', '{"total_steps": 5}']
)
def test_a_damaged_done_file_does_not_complete_a_run(tmp_path, content):
    folder = make_run(tmp_path / "logs", HOPPER, (0.5,), 0, constant(1.0))
    (folder / "done.json").write_text(content)
    (run,), _ = read_runs(tmp_path / "logs")
    assert run.status == "10 of 10"


# ------------------------------------------------------------------------------- page and figures


def test_the_same_files_give_the_same_bytes(results, logs, tmp_path):
    again = write_report(logs, tmp_path / "results").parent
    digests = [
        {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (results, again)
    ]
    assert digests[0] == digests[1]
    assert set(digests[0]) == {
        "README.md", "summary.csv",
        *(f"tables/{stem}.{kind}" for kind in ("md", "csv", "tex") for stem in (
            "headline", "scores", "groups", "chain", "weights", "published", "published_groups")),
        *(f"figures/{stem}.{kind}" for kind in ("png", "pdf") for stem in (
            "intervals", "published", f"curves_{CHEETAH}", f"curves_{HOPPER}", "chain_hopper",
            "weights_halfcheetah", "weights_hopper")),
    }  # fmt: skip


def test_a_second_report_replaces_the_first(logs, tmp_path):
    results = tmp_path / "results"
    write_report(logs, results)
    shutil.rmtree(logs / CHEETAH)
    page = write_report(logs, results)
    assert CHEETAH not in page.read_text()
    assert CHEETAH not in (results / "summary.csv").read_text()


def test_page_links_its_figures(results):
    page = (results / "README.md").read_text()
    linked = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert len(linked) == 7
    assert page.count("## Sensitivity to w2_weights") == page.count("| rank |") == 1
    assert all((results / name).is_file() for name in linked)
    assert f"| {HOPPER} | 0.2, 0.3 | 2 | 2 | 20 | 23.4 | 52.0 ± 2.8 | 82.0 ± 2.8 |" in page
    assert "Not directly comparable" not in page


def test_page_warns_about_other_data(tmp_path):
    make_run(tmp_path / "logs", MAZE, (1.0,), 0, constant(3.0), source="local")
    page = write_report(tmp_path / "logs", tmp_path / "results").read_text()
    assert "these runs were trained on other data (data.source: local)" in page


def lines_of(axes, label):
    return [line for line in axes.get_lines() if line.get_label() == label]


def test_curves_have_a_line_and_a_band_for_each_actor(logs):
    hopper = [s for s in settings(read_runs(logs)[0]) if s.task == HOPPER]
    figure = curves_figure(hopper)
    panels = figure.get_axes()
    assert len(panels) == 2 * 2  # settings x modes
    for axes, setting in zip(panels[::2], hopper):
        for actor in (0, 1):
            (line,) = lines_of(axes, f"actor {actor}")
            assert line.get_xdata().tolist() == [10, 20]
            np.testing.assert_allclose(
                line.get_ydata(),
                np.mean([run.evaluations.scores[:, actor, 0] for run in setting.runs], 0),
            )
    filled = [[band for band in axes.collections if len(band.get_paths())] for axes in panels]
    assert [len(bands) for bands in filled[1:]] == [2, 2, 2]
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker())
              for actor in (0, 1) for line in lines_of(panels[0], f"actor {actor}")}  # fmt: skip
    assert all(len(set(column)) == 2 for column in zip(*styles))
    # band of mean ± sample standard deviation
    low = 30 - math.sqrt(700)
    assert filled[1][1].get_paths()[0].vertices[:, 1].min() == pytest.approx(low - 1)
    assert panels[0].get_ylabel() == "D4RL score"
    assert panels[-1].get_xlabel() == "updates"


def test_one_seed_has_no_band(tmp_path):
    make_run(tmp_path / "logs", HOPPER, (1.0,), 0, constant(3.0, steps=3))
    figure = curves_figure(settings(read_runs(tmp_path / "logs")[0]))
    assert [list(axes.collections) for axes in figure.get_axes()] == [[], []]


def test_curves_of_seeds_at_different_steps(tmp_path):
    logs = tmp_path / "logs"
    make_run(logs, HOPPER, (1.0,), 0, constant(10.0, steps=3))
    make_run(logs, HOPPER, (1.0,), 1, constant(20.0, steps=2), done=False, total=30)
    (setting,) = settings(read_runs(logs)[0])
    assert setting.last_steps == "20-30"
    (line,) = lines_of(curves_figure([setting]).get_axes()[0], "actor 0")
    assert line.get_ydata().tolist() == [15.0, 15.0, 10.0]


def test_markers_of_the_other_figures(logs):
    found = settings(read_runs(logs)[0])
    selected = best_settings(found)

    def dots(figure):
        """Labels of the means in all panels."""
        return [c.get_label() for axes in figure.get_axes() for c in axes.containers]

    assert sorted(dots(chain_figure(found))) == sorted(["π1 − π0", "last actor − π0"] * 2 * 2)
    assert len(dots(weights_figure(found))) == 3 * 2
    assert set(dots(published_figure(selected))) == {*ALGORITHMS, "POGO, these runs (data: d4rl)"}
    intervals = intervals_figure(group_scores(selected))
    # only the last actor in "all tasks" and halfcheetah, two actors in hopper
    assert len(dots(intervals)) == 2 * 2 * (1 + 1 + 2)
    for figure in (chain_figure(found), weights_figure(found), intervals):
        assert not any(axes.get_legend() for axes in figure.get_axes())  # it would hide data
        assert len(figure.legends) == 1


# ------------------------------------------------------------------------------- published


def test_published_scores_have_the_means_of_their_tables():
    tasks = list(PER_TASK)
    means = {
        name: [np.mean([PER_TASK[t][name].mean for t in part]) for part in (tasks[:9], tasks[9:])]
        for name in ALGORITHMS
    }
    # the last row of table 3 of the paper, which truncates instead of rounding
    assert [math.floor(10 * means[name][1]) / 10 for name in ALGORITHMS] == [28.7, 58.3, 76.8]
    given = {row.algorithm: row[1:3] for row in GROUP_MEANS}
    for name, row in (("TD3+BC", "TD3+BC, tuned"), ("IQL", "IQL, tuned"), ("ReBRAC", "ReBRAC")):
        np.testing.assert_allclose(means[name], given[row], atol=0.1)


# ------------------------------------------------------------------------------- command


def test_the_command_reports_a_real_run(tmp_path):
    process = train(tmp_path, f"data.cache_dir={tmp_path / 'cache'}", "total_steps=12")
    assert process.returncode == 0, process.stderr
    done = subprocess.run(  # reads logs and writes results by default
        [sys.executable, "-m", "pogo_torchrl.report"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Report: results/README.md\n"
    rows = read_csv(tmp_path / "results" / "summary.csv")
    assert len(rows) == 2 * 2
    with (run_folder(tmp_path) / "training" / "evaluations.csv").open() as file:
        last = [r for r in csv.DictReader(file) if r["step"] == "12"]
    for row, expected in zip(rows, last):
        assert (row["actor"], row["mode"], row["status"]) == (
            expected["actor"], expected["mode"], "done",
        )  # fmt: skip
        assert float(row["last_score"]) == pytest.approx(float(expected["score"]), abs=1e-4)
        assert math.isfinite(float(row["data_score"]))  # read from the log of the run


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("log_dir=nowhere", "pogo: log_dir=nowhere contains no runs"),
        ("log_dri=logs", "pogo: unknown option 'log_dri'; did you mean log_dir?"),
        ("--fast", "pogo: unknown option 'fast'"),
        ("log_dir=", "pogo: log_dir needs a value"),
    ],
)
def test_bad_input_gives_a_one_line_error(tmp_path, monkeypatch, capsys, argument, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["report", argument])
    out, error = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert error.startswith(message)
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_must_not_be_read_is_not_called_empty(tmp_path, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert capsys.readouterr().err.startswith(f"pogo: no access to {tmp_path} (Permission denied)")


def test_the_folder_of_the_runs_alone(logs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["report", str(logs)])
    page = (tmp_path / "results" / "README.md").read_bytes()
    main(["report", f"log_dir={logs}", "results_dir=other"])
    assert (tmp_path / "other" / "README.md").read_bytes() == page
    with pytest.raises(SystemExit):
        main(["report", "nowhere"])
    assert "log_dir=nowhere contains no runs" in capsys.readouterr().err


def test_a_results_dir_that_is_a_file_gives_a_one_line_error(logs, tmp_path, capsys):
    (tmp_path / "results").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["report", f"log_dir={logs}", f"results_dir={tmp_path / 'results'}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "results_dir" in error
    assert len(error.splitlines()) == 1
