"""Score table and learning curves of a single run."""

from __future__ import annotations

import pytest

from pogo_torchrl.report import plot_curves, read_scores, score_table

SCORES = {  # (actor, mode): scores at steps 100, 200
    (0, "deterministic"): (50.0, 48.25),
    (0, "stochastic"): (47.0, 46.0),
    (1, "deterministic"): (61.0, 101.26),
    (1, "stochastic"): (-1.25, 7.0),
}


@pytest.fixture
def evaluations(tmp_path):
    lines = ["step,actor,mode,return_mean,return_std,score,episode_length,seconds"]
    for i, step in enumerate((100, 200)):
        lines += [
            f"{step},{actor},{mode},1.0,0.0,{scores[i]},9,0.1"
            for (actor, mode), scores in SCORES.items()
        ]
    path = tmp_path / "evaluations.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_scores_by_actor_and_mode(evaluations):
    curves = read_scores(evaluations)
    assert curves == {key: ([100, 200], list(scores)) for key, scores in SCORES.items()}


def test_table_of_last_and_best_scores(evaluations):
    table = score_table(evaluations, 45.04).splitlines()
    assert table[-3].split() == ["actor", "0", "48.2", "50.0", "46.0", "47.0"]
    assert table[-2].split() == ["actor", "1", "101.3", "101.3", "7.0", "7.0"]
    assert table[-1].split() == ["dataset", "45.0"]
    assert len({line.rstrip().rfind(".") for line in table[-3:-1]}) == 1  # aligned


def test_curves_are_drawn(evaluations, tmp_path):
    small, large = tmp_path / "one.png", tmp_path / "two.png"
    plot_curves(evaluations, small, title="hopper", behaviour_score=45.0)
    assert small.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert small.stat().st_size > 5000
    plot_curves(evaluations, large, title="hopper", behaviour_score=60.0)
    assert large.read_bytes() != small.read_bytes()


def test_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        score_table(tmp_path / "evaluations.csv", 0.0)
