"""Sweep files: parsing and expansion to a list of runs. Starts and writes nothing.

A sweep file is YAML::

    common:                     # for all runs: seeds, and any option of pogo train
      total_steps: 1000000
      eval_interval: 10000
      seeds: [0, 1, 2]
    sinkhorn: {K: 4, blur: 0.05, backend: fast}
    environments:               # per task: its w2_weights, and any option of pogo train
      reach: {env: {id: "myreach:Reach-v0"}, data: {source: hdf5, path: reach.hdf5}}  # one's own
      hopper:
        medium:
          w2_weights_base: [0.2, 0.2]
          w2_weights_third: [0.1, 0.2, 0.3]
          learning_rate: 3e-4
          grid: {alpha: [0.5, 1], batch_size: [128, 256]}    # all combinations

Options of a task take precedence over ``common``, and the command line over both. ``algorithm``
and ``chain`` may be lists, such as ``algorithm: [td3_bc, iql]``: each combination is a setting.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pogo_torchrl.experiments import algorithms, config
from pogo_torchrl.experiments.option_files import flatten, read_yaml, to_override
from pogo_torchrl.experiments.overrides import check_options, check_overrides, compose
from pogo_torchrl.experiments.run_folder import RunFolder
from pogo_torchrl.report.run_logs import setting_label

# Option names of the original code, and of the section sinkhorn.
_ALIASES = {"max_timesteps": "total_steps", "eval_freq": "eval_interval", "learning_rate": "lr"}
_SINKHORN = {"K": "num_samples", "blur": "blur", "backend": "w2_backend"}
# Prefix of options in the section grid, each of which has a list of values.
_GRID = "grid."
_CHOICES = ("algorithm", "chain")  # options that may list several values
_WEIGHTS = ("w2_weights", "w2_weights_base", "w2_weights_third", "w2_weights_grid")

# Options that distinguish the runs or separate their files are set by the sweep.
_RESERVED = {
    "task": "write it as a key of environments in the sweep file",
    "seed": "write seeds: [0, 1, 2] in the sweep file",
    "resume": "leave it out, a sweep always resumes unfinished runs",
    "checkpoint_dir": "leave it out, each run keeps its checkpoints in its folder below log_dir",
}

# Larger stacks need more memory and are not faster on a CPU.
MAX_STACK_SIZE = 16

# Far beyond any study, but a typo in a grid can ask for billions.
_MAX_RUNS = 10_000


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a sweep.

    Args:
        arguments: options of ``pogo train`` that start the run, as ``option=value``.
        cfg: the :class:`~pogo_torchrl.experiments.config.RunConfig` composed from them.
    """

    arguments: tuple[str, ...]
    cfg: DictConfig

    @property
    def folder(self) -> RunFolder:
        """Folders of the run."""
        return RunFolder.of(self.cfg)

    @property
    def label(self) -> str:
        """The weights and, except for POGO, the algorithm: ``td3_bc + 2 (3.33, 3.33)``."""
        cfg = self.cfg
        return setting_label(cfg.algorithm, tuple(cfg.w2_weights), cfg.variant or "")

    @property
    def name(self) -> str:
        """Folder of the run below ``log_dir``, e.g. ``hopper-medium-v2/w2_0.1_0.5/seed_0``."""
        return self.folder.root.relative_to(self.cfg.log_dir).as_posix()


def sweep_names() -> list[str]:
    """Names of the bundled sweep files.

    Example:
        >>> sweep_names()
        ['antmaze', 'locomotion']
    """
    folder = resources.files("pogo_torchrl.experiments") / "conf" / "sweep"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())


def read_sweep(name: str, overrides: Sequence[str] = ()) -> list[Run]:
    r"""Expand a sweep file to its runs, ordered by task, weights and seed.

    Args:
        name: path of a sweep file, or one of :func:`sweep_names`.
        overrides: options for all runs as ``option=value``; they take precedence over the file.
            Defaults to none.

    Returns:
        The runs.

    Raises:
        ValueError: for an invalid sweep file; the message names the file, the key, its value, and
            the allowed values.

    Example:
        >>> import tempfile
        >>> text = '''
        ... common: {max_timesteps: 2e4, seeds: [0, 1]}
        ... environments:
        ...   hopper:
        ...     medium: {w2_weights_base: [0.2, 0.3], w2_weights_third: [0.1, 0.5]}
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "sweep.yaml")
        ...     _ = file.write_text(text)
        ...     runs = read_sweep(str(file), ["lr=1e-4"])
        >>> for run in runs:
        ...     print(run.name, run.cfg.total_steps, run.cfg.lr)
        hopper-medium-v2/w2_0.2_0.3_0.1/seed_0 20000 0.0001
        hopper-medium-v2/w2_0.2_0.3_0.1/seed_1 20000 0.0001
        hopper-medium-v2/w2_0.2_0.3_0.5/seed_0 20000 0.0001
        hopper-medium-v2/w2_0.2_0.3_0.5/seed_1 20000 0.0001
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key == "w2_weights":
            raise ValueError(f"{override}: the weights differ between runs; set them in {name}.")
        if key in _RESERVED:
            raise ValueError(f"{override} cannot apply to all runs: {_RESERVED[key]}.")
    path = _find(name)
    content = _load(path)
    try:
        runs = list(_runs(content, overrides))
        _check_distinct(runs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return runs


def _find(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name in sweep_names():
        return Path(
            str(resources.files("pogo_torchrl.experiments") / "conf" / "sweep" / f"{name}.yaml")
        )
    raise ValueError(
        f"sweep={name} is neither a file nor a bundled sweep ({', '.join(sweep_names())})."
    )


def _load(path: Path) -> dict[str, Any]:
    return _section(read_yaml(path), str(path), ("common", "sinkhorn", "environments"))


def _section(content: Any, where: str, known: Sequence[str] = ()) -> dict[str, Any]:
    """Check that a section is a mapping (or empty), with known keys if these are given."""
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: {content} must be a mapping, key: value.")
    for key in content:
        if known and key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}."
            raise ValueError(f"{where}: {key} is unknown; {hint}")
    return {str(key): value for key, value in content.items()}


def _runs(content: dict[str, Any], overrides: Sequence[str]) -> Iterator[Run]:
    common = _options(content.get("common"), "common")
    names = {**_SINKHORN, "num_samples": "num_samples"}
    sinkhorn = _section(content.get("sinkhorn"), "sinkhorn", list(names))
    common = _merge(
        common, _options({names[key]: v for key, v in sinkhorn.items()}, "sinkhorn"), "sinkhorn"
    )
    tasks = list(_tasks(content.get("environments"), common))
    if not tasks:
        raise ValueError("environments is empty; give tasks, e.g. hopper: {medium: {}}.")
    for task, section, where in tasks:
        own = _options(section, where)
        inherited = {
            key: value
            for key, value in common.items()
            if not (key in _WEIGHTS and own.keys() & set(_WEIGHTS))
        }
        try:
            yield from _task_runs(task, {**inherited, **own}, overrides)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _merge(left: dict[str, Any], right: dict[str, Any], where: str) -> dict[str, Any]:
    for key in left.keys() & right.keys():
        raise ValueError(f"{where}: {key} is given twice; give it once.")
    return {**left, **right}


def _tasks(environments: Any, common: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Task, section and key of each entry, ``hopper: {medium: ...}`` or ``hopper-medium: ...``.

    A task of one's own is ``reach: {env: {id: ...}, ...}`` or ``./mytask.yaml: ...``.
    """
    for name, levels in _section(environments, "environments").items():
        where = f"environments.{name}"
        if _task_name(name) in config.all_tasks():
            yield _task_name(name), levels, where
            continue
        if _is_own_task(name, levels, common):
            yield name, levels, where
            continue
        known = {task for task in config.all_tasks() if task.startswith(f"{name}-")}
        if not known:
            names = sorted({task.partition("-")[0] for task in config.tasks()})
            near = difflib.get_close_matches(name, [*names, *config.tasks()], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}."
            raise ValueError(f"environments: {name} is unknown; {hint}")
        for level, section in _section(levels, where).items():
            task = _task_name(f"{name}-{level}")
            if task not in known:
                allowed = [t.removeprefix(f"{name}-").removesuffix("-v2") for t in sorted(known)]
                raise ValueError(f"{where}: {level} is unknown; choose from {', '.join(allowed)}.")
            yield task, section, f"{where}.{level}"


def _is_own_task(name: str, section: Any, common: Mapping[str, Any]) -> bool:
    if name.endswith((".yaml", ".yml")):
        return True
    options = {**common, **dict(flatten(section if isinstance(section, Mapping) else {}))}
    known = any(task.startswith(f"{name}-") for task in config.tasks())
    return not known and ("env.id" in options or options.get("data.source") == "minari")


def _task_name(name: str) -> str:
    """Name of a task with its version, which may be omitted in the file."""
    return f"{name.removesuffix('-v2')}-v2"


def _options(section: Any, where: str) -> dict[str, Any]:
    """Options of a section under their command-line names, with types checked."""
    options: dict[str, Any] = {}
    for given, value in flatten(_section(section, where)):
        prefix = _GRID if given.startswith(_GRID) else ""
        option = given.removeprefix(prefix)
        option = _ALIASES.get(option, option)
        key = prefix + option
        if option in _RESERVED:
            raise ValueError(f"{where}: {key} is not allowed here: {_RESERVED[option]}.")
        if prefix:
            _check_grid(option, value, where)
        elif key not in (*_WEIGHTS, "seeds"):
            values = value if key in _CHOICES and isinstance(value, list) else [value]
            try:
                if not values:
                    raise ValueError(f"{key}=[] is empty; give one value or several.")
                check_overrides([f"{key}={to_override(one)}" for one in values])
            except ValueError as error:
                raise ValueError(f"{where}.{given}: {error}") from error
        options = _merge(options, {key: value}, where)
    return options


def _check_grid(option: str, values: Any, where: str) -> None:
    if option in (*_WEIGHTS, "seeds", "variant", "log_dir"):
        hint = "w2_weights_grid" if option in _WEIGHTS else f"{option}, outside of the grid"
        raise ValueError(f"{where}.grid: {option} is not allowed here: write {hint}.")
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}.grid: {option}={values} must be a list of values.")
    for value in values:
        try:
            check_overrides([f"{option}={to_override(value)}"])
        except ValueError as error:
            raise ValueError(f"{where}.grid: {error}") from error


def _task_runs(task: str, settings: dict[str, Any], overrides: Sequence[str]) -> Iterator[Run]:
    seeds = settings.pop("seeds", None)
    if seeds is None:
        raise ValueError("seeds are missing; write seeds: [0, 1, 2], in common for all tasks.")
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
        raise ValueError(f"seeds={seeds} must be a list of integers, e.g. [0, 1, 2].")
    weights = _weights({key: settings.pop(key) for key in _WEIGHTS if key in settings})
    fixed = {override.partition("=")[0] for override in overrides}  # takes precedence
    choices = {key: settings.pop(key) for key in _CHOICES if key in settings}
    lists = [
        [f"{key}={to_override(one)}" for one in (value if isinstance(value, list) else [value])]
        for key, value in choices.items()
        if key not in fixed
    ]
    grid = {key: settings.pop(key) for key in list(settings) if key.startswith(_GRID)}
    names = [key.removeprefix(_GRID) for key in grid]
    given = [f"{key}={to_override(value)}" for key, value in settings.items() if key not in names]
    if grid:
        given.append(f"variant='${{variant_of:{','.join(names)}}}'")
    lists += [[f"{n}={to_override(v)}" for v in vs] for n, vs in zip(names, grid.values())]
    for chosen in itertools.product(*lists):
        arguments = [f"task={task}", "progress_bar=false", *given, *chosen]
        yield from _chains(arguments, seeds, weights, overrides)


def _chains(
    given: Sequence[str], seeds: list[int], weights: list[list[float]], overrides: Sequence[str]
) -> Iterator[Run]:
    """Runs of all chains and seeds with the same options otherwise."""
    cfg = compose([*given, *overrides, "resume=true"])
    if cfg.step_sizes is not None and weights:
        raise ValueError(f"step_sizes={cfg.step_sizes} set w2_weights; give one of the two.")
    given, overrides = (
        [argument for argument in arguments if not argument.startswith("step_sizes=")]
        for arguments in (given, overrides)
    )
    for chain in weights or [list(cfg.w2_weights)]:
        own = copy.deepcopy(cfg)
        own.w2_weights = chain
        own = algorithms.resolve(own)
        for seed in seeds:
            run = copy.deepcopy(own)
            run.seed = seed
            check_options(run)
            numbers = (f"w2_weights={to_override(list(own.w2_weights))}", f"seed={seed}")
            yield Run((*given, *numbers, *overrides, "resume=true"), run)


def _weights(given: dict[str, Any]) -> list[list[float]]:
    """Weights of each chain; empty if the task's preset sets them."""
    for key, value in given.items():
        lists = value if key == "w2_weights_grid" and isinstance(value, list) else [value]
        if not lists or not all(map(_are_numbers, lists)):
            wanted = "lists of numbers, one for each actor" if lists is value else "numbers"
            raise ValueError(f"{key}={value} must be a list of {wanted}.")
    if not given:
        return []
    if given.keys() == {"w2_weights"}:
        return [given["w2_weights"]]
    if given.keys() == {"w2_weights_grid"}:
        candidates = given["w2_weights_grid"]
    elif given.keys() == {"w2_weights_base", "w2_weights_third"}:
        base = given["w2_weights_base"]
        if len(base) != 2:
            raise ValueError(
                f"w2_weights_base={base} must have two numbers, to which w2_weights_third adds the "
                "third; use w2_weights_grid for chains of any length."
            )
        candidates = [*([weight] for weight in base), given["w2_weights_third"]]
    else:
        raise ValueError(
            f"{' and '.join(given)} cannot be used in this combination: give either w2_weights, "
            "w2_weights_base with w2_weights_third, or w2_weights_grid."
        )
    if math.prod(map(len, candidates)) > _MAX_RUNS:
        raise ValueError(f"the weights give more than {_MAX_RUNS} chains; use fewer weights.")
    return [list(chain) for chain in itertools.product(*candidates)]


def _are_numbers(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    )


def _check_distinct(runs: Sequence[Run]) -> None:
    """Check that all runs have different folders below the same ``log_dir``."""
    if len(runs) > _MAX_RUNS:
        raise ValueError(f"{len(runs)} runs are more than {_MAX_RUNS}; use fewer runs.")
    folders: set[Path] = set()
    for run in runs:
        if run.cfg.log_dir != runs[0].cfg.log_dir:
            raise ValueError(
                f"log_dir is {runs[0].cfg.log_dir} and {run.cfg.log_dir}; set the same for all "
                "runs, in common or on the command line."
            )
        if run.folder.root in folders:
            raise ValueError(f"the run {run.name} is listed twice; list it once.")
        folders.add(run.folder.root)


def group_stackable(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs that can be trained as one batched computation.

    Runs in a group differ only in ``seed``, ``w2_weights`` (of equal length) and ``alpha``.

    Args:
        runs: the runs.

    Returns:
        Groups of at most :data:`MAX_STACK_SIZE` runs.
    """
    found: dict[str, list[list[Run]]] = {}
    for run in runs:
        own = ("seed", "w2_weights", "alpha", "variant")
        shared = {k: v for k, v in run.cfg.items() if k not in own}
        key = OmegaConf.to_yaml({**shared, "actors": len(run.cfg.w2_weights)})
        groups = found.setdefault(key, [[]])
        if len(groups[-1]) == MAX_STACK_SIZE:
            groups.append([])
        groups[-1].append(run)
    return [group for groups in found.values() for group in groups]
