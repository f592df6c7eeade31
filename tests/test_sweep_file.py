"""Sweep files: expansion to runs, and errors."""

from __future__ import annotations

import pytest

from pogo_torchrl.experiments import config
from pogo_torchrl.experiments.algorithms import resolve
from pogo_torchrl.experiments.overrides import compose
from pogo_torchrl.experiments.sweep_file import read_sweep, sweep_names

SEEDS = "common: {seeds: [0]}\n"


def expand(folder, text, *overrides):
    file = folder / "sweep.yaml"
    file.write_text(text)
    return read_sweep(str(file), overrides)


def weights(runs):
    return [list(run.cfg.w2_weights) for run in runs]


def test_file_format_of_the_original_code(tmp_path):
    runs = expand(
        tmp_path,
        """
        common: {max_timesteps: 5000, eval_freq: 1e3, seeds: [3, 5]}
        sinkhorn: {K: 8, blur: 0.1, backend: tensorized}
        environments:
          hopper:
            medium:
              w2_weights_base: [0.2, 0.2]
              w2_weights_third: [0.1, 0.2, 0.3]
              learning_rate: 3e-4
        """,
    )
    third = [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert weights(runs) == [[0.2, 0.2, w] for w in third]
    assert [run.cfg.seed for run in runs] == [3, 5] * 3
    for run in runs:
        cfg = run.cfg
        assert (cfg.task, cfg.total_steps, cfg.eval_interval) == ("hopper-medium-v2", 5000, 1000)
        assert (cfg.num_samples, cfg.blur, cfg.w2_backend) == (8, 0.1, "tensorized")
        assert cfg.lr == 3e-4
        assert cfg.alpha == 0.01  # from the preset
    assert runs[1].name == "hopper-medium-v2/w2_0.2_0.2_0.1/seed_5"


def test_arguments_of_a_run_compose_to_its_config(tmp_path):
    runs = expand(
        tmp_path,
        """
        common: {seeds: [0, 1], data: {path: "it's, {odd}.hdf5", source: hdf5}, compile: false}
        environments:
          antmaze: {umaze: {w2_weights: [1, 2e-1], critic_layer_norm: true, hidden_sizes: [8]}}
        """,
        "gamma=0.9",
    )
    for run in runs:
        cfg = compose(run.arguments)
        assert cfg == run.cfg
        assert cfg.data.path == "it's, {odd}.hdf5"
        assert cfg.resume
        assert cfg.gamma == 0.9


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("{w2_weights: [1, 0.5]}", [[1, 0.5]]),
        ("{w2_weights: [0.3]}", [[0.3]]),
        ("", [[0.25, 0.048, 0.048]]),  # from the preset
        ("{w2_weights_grid: [[1, 2], [3], [4, 5e-1]]}",
         [[1, 3, 4], [1, 3, 0.5], [2, 3, 4], [2, 3, 0.5]]),
        ("{w2_weights_grid: [[1], [2], [3], [4], [5]]}", [[1, 2, 3, 4, 5]]),
        ("{w2_weights_base: [1, 2], w2_weights_third: [3, 4]}", [[1, 2, 3], [1, 2, 4]]),
    ],
)  # fmt: skip
def test_ways_to_give_weights(tmp_path, entry, expected):
    assert weights(expand(tmp_path, f"{SEEDS}environments: {{hopper-medium: {entry}}}")) == expected


@pytest.mark.parametrize(
    "environments",
    [
        "{hopper: {medium-replay: }}",
        "{hopper: {medium-replay-v2: }}",
        "{hopper-medium-replay: }",
        "{hopper-medium-replay-v2: {}}",
    ],
)
def test_names_of_tasks(tmp_path, environments):
    (run,) = expand(tmp_path, f"{SEEDS}environments: {environments}")
    assert run.cfg.task == "hopper-medium-replay-v2"


def test_precedence_of_task_common_and_command_line(tmp_path):
    text = """
    common: {seeds: [0], lr: 1e-3, batch_size: 32, gamma: 0.9, w2_weights: [7, 8]}
    environments:
      hopper-medium: {lr: 1e-2, batch_size: 64, w2_weights_grid: [[1], [2]]}
      walker2d-medium:
    """
    hopper, walker = expand(tmp_path, text, "batch_size=128")
    assert (hopper.cfg.lr, walker.cfg.lr) == (1e-2, 1e-3)
    assert hopper.cfg.batch_size == walker.cfg.batch_size == 128
    assert hopper.cfg.gamma == 0.9
    assert weights([hopper, walker]) == [[1, 2], [7, 8]]


HOPPER = "environments: {hopper: {medium: {w2_weights: [0.1]}}}"


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("", ["environments is empty"]),
        ("[1, 2]", ["must be a mapping"]),
        ("a: [", ["not valid YAML"]),
        ("common: {seeds: [0], seeds: [1]}\n" + HOPPER, ["not valid YAML", "seeds"]),
        ("comon: {seeds: [0]}\n" + HOPPER, ["comon is unknown", "did you mean common"]),
        (HOPPER, ["environments.hopper.medium", "seeds are missing"]),
        ("common: {seeds: 5}\n" + HOPPER, ["seeds=5", "list of integers"]),
        ("common: {seeds: []}\n" + HOPPER, ["seeds=[]"]),
        ("common: {seeds: [0.5]}\n" + HOPPER, ["seeds=[0.5]"]),
        ("common: {seeds: [-1]}\n" + HOPPER, ["seed=-1", "from 0 to"]),
        ("common: {seeds: [0, 0]}\n" + HOPPER, ["hopper-medium-v2/w2_0.1/seed_0", "twice"]),
        ("common: {seeds: [0], total_step: 5}\n" + HOPPER, ["total_step", "total_steps"]),
        ("common: {seeds: [0], total_steps: many}\n" + HOPPER,
         ["common.total_steps", "total_steps='many' must be an integer"]),
        ("common: {seeds: [0], max_timesteps: 1.5}\n" + HOPPER,
         ["common.max_timesteps", "total_steps=1.5 must be an integer"]),
        ("common: {seeds: [0], max_timesteps: 1, total_steps: 2}\n" + HOPPER,
         ["total_steps is given twice"]),
        ("common: {seeds: [0], eval_episodes: 0}\n" + HOPPER, ["eval_episodes=0", "1 to 10000"]),
        ("common: {seeds: [0], seed: 1}\n" + HOPPER, ["seed is not allowed here", "seeds"]),
        ("common: {seeds: [0], resume: true}\n" + HOPPER, ["resume is not allowed here"]),
        ("common: {seeds: [0], checkpoint_dir: x}\n" + HOPPER, ["checkpoint_dir is not allowed"]),
        ("common: {seeds: [0], lr: [1e-3, 1e-4]}\n" + HOPPER, ["lr=[0.001,0.0001]", "a number"]),
        (SEEDS + "sinkhorn: {k: 4}\n" + HOPPER, ["k is unknown"]),
        (SEEDS + "sinkhorn: {K: four}\n" + HOPPER, ["num_samples='four'"]),
        ("common: {seeds: [0], blur: 1}\nsinkhorn: {blur: 1}\n" + HOPPER, ["blur is given twice"]),
        (SEEDS + "environments: {hoper: {medium: }}", ["hoper is unknown", "hopper"]),
        (SEEDS + "environments: {hopper: {medum: }}", ["medum is unknown", "medium"]),
        (SEEDS + "environments: {hopper: [medium]}", ["must be a mapping"]),
        (SEEDS + "environments: {hopper: {medium: 3}}", ["environments.hopper.medium: 3"]),
        (SEEDS + "environments: {hopper: {medium: }, hopper-medium-v2: }", ["twice"]),
        (SEEDS + "environments: {hopper-medium: {w2_weights: 0.1}}", ["w2_weights=0.1"]),
        (SEEDS + "environments: {hopper-medium: {w2_weights: []}}", ["w2_weights=[]"]),
        (SEEDS + "environments: {hopper-medium: {w2_weights: [a]}}", ["w2_weights=['a']"]),
        (SEEDS + "environments: {hopper-medium: {w2_weights: [.inf]}}", ["must be finite"]),
        (SEEDS + "environments: {hopper-medium: {w2_weights_grid: [0.1]}}",
         ["w2_weights_grid=[0.1]", "one for each actor"]),
        (SEEDS + "environments: {hopper-medium: {w2_weights_base: [1, 2]}}",
         ["w2_weights_base", "w2_weights_third"]),
        (SEEDS + "environments: {hopper-medium: {w2_weights_base: [1], w2_weights_third: [1]}}",
         ["w2_weights_base=[1]", "two numbers"]),
        (SEEDS + "environments: {hopper-medium: {w2_weights: [1, 2], w2_weights_base: [1, 2]}}",
         ["w2_weights and w2_weights_base"]),
        (SEEDS + "environments: {hopper-medium: {log_dir: a}, walker2d-medium: {log_dir: b}}",
         ["log_dir is a and b"]),
        (f"{SEEDS}environments: {{hopper-medium: {{w2_weights_grid: {[list(range(99))] * 9}}}}}",
         ["more than 10000"]),
    ],
)  # fmt: skip
def test_invalid_files_are_rejected(tmp_path, text, answers):
    with pytest.raises(ValueError, match=r"sweep\.yaml") as error:
        expand(tmp_path, text)
    for answer in answers:
        assert answer in str(error.value)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("seed=1", "seeds: "),
        ("task=hopper-medium-v2", "environments"),
        ("w2_weights=[1,2]", "the weights differ between runs"),
        ("resume=false", "a sweep always resumes"),
        ("checkpoint_dir=x", "below log_dir"),
    ],
)
def test_options_that_cannot_apply_to_all_runs(tmp_path, override, answer):
    with pytest.raises(ValueError, match=answer) as error:
        expand(tmp_path, SEEDS + HOPPER, override)
    assert override in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"is neither a file nor a .*\(antmaze, locomotion\)"):
        read_sweep(str(tmp_path / "sweep.yaml"))


@pytest.mark.parametrize("name", sweep_names())
def test_bundled_sweeps_contain_the_original(name):
    runs = read_sweep(name)
    tasks = {run.cfg.task for run in runs}
    antmaze = {task for task in config.tasks() if task.startswith("antmaze")}
    assert tasks == (antmaze if name == "antmaze" else set(config.tasks()) - antmaze)
    assert len(runs) == len(tasks) * 3 * 3
    for task in tasks:
        original = compose([f"task={task}", "algorithm=original"])
        found = [run.cfg for run in runs if run.cfg.task == task]
        assert original.w2_weights in [cfg.w2_weights for cfg in found]
        for cfg in found:
            assert cfg.data.source == "d4rl"
            assert cfg.w2_weights[:2] == original.w2_weights[:2]
            for key in ("alpha", "data_weight", "return_temperature", "average_actors", "tau"):
                assert cfg[key] == original[key]


def test_step_sizes_set_the_weights(tmp_path):
    file = tmp_path / "sweep.yaml"
    section = "environments: {hopper: {medium: {%s}}, walker2d: {medium: {}}}"
    common = "common: {seeds: [0], alpha: 1, step_sizes: [0.5, 0.5]}\n"
    file.write_text(common + section % "")
    hopper, walker = read_sweep(str(file))
    assert list(hopper.cfg.w2_weights) == pytest.approx([1, 2 / 3])
    assert list(walker.cfg.w2_weights) == pytest.approx([1, 1 / 3])
    assert compose(hopper.arguments) == hopper.cfg  # what its process composes
    file.write_text(common + section % "w2_weights: [1, 1]")
    with pytest.raises(ValueError, match=r"step_sizes=.* set w2_weights; give one of the two"):
        read_sweep(str(file))


def test_a_grid_makes_runs_of_all_combinations_with_folders_of_their_own(tmp_path):
    runs = expand(
        tmp_path,
        """
        common: {seeds: [0, 1], learning_rate: 1, grid: {learning_rate: [1e-4, 3e-4]}}
        environments:
          hopper:
            medium: {w2_weights: [1], grid: {data: {size: [10, 1e3]}}}
            medium-replay: {w2_weights: [2], grid: {lr: [0.5]}}
        """,
    )
    names = [
        f"hopper-medium-v2/w2_1_lr_{lr}_size_{size}/seed_{seed}"
        for lr in ("0.0001", "0.0003")
        for size in (10, 1000)
        for seed in (0, 1)
    ]
    replay = [f"hopper-medium-replay-v2/w2_2_lr_0.5/seed_{seed}" for seed in (0, 1)]
    assert [run.name for run in runs] == names + replay
    assert [(run.cfg.lr, run.cfg.data.size) for run in runs[2:6]] == [
        (1e-4, 1000), (1e-4, 1000), (3e-4, 10), (3e-4, 10),
    ]  # fmt: skip
    for run in runs:
        assert resolve(compose(run.arguments)) == run.cfg


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("{lr: 1}", ["lr=1 must be a list of values"]),
        ("{lr: []}", ["must be a list of values"]),
        ("{lr: [1, fast]}", ["lr=", "a number"]),
        ("{lrr: [1]}", ["did you mean lr"]),
        ("{w2_weights: [[1], [2]]}", ["w2_weights_grid"]),
        ("{seeds: [0, 1]}", ["seeds, outside of the grid"]),
        ("{checkpoint_dir: [a, b]}", ["below log_dir"]),
    ],
)
def test_errors_of_grids(tmp_path, grid, words):
    with pytest.raises(ValueError, match=r"sweep\.yaml") as error:
        expand(
            tmp_path,
            f"common: {{seeds: [0], grid: {grid}}}\n" + "environments: {hopper: {medium: }}",
        )
    assert all(word in str(error.value) for word in words)
