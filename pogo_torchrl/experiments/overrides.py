"""Parsing and validation of command-line options."""

from __future__ import annotations

import difflib
import math
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pogo_torchrl.experiments.config import (
    RunConfig,
    SweepConfig,
    iter_options,
    to_text,
    top_level_options,
)
from pogo_torchrl.experiments.multirun import is_multirun
from pogo_torchrl.experiments.own_task import resolve_task
from pogo_torchrl.experiments.presets import algorithms, all_tasks, own_tasks, tasks
from pogo_torchrl.experiments.typed_text import expand_paths, fill_braces, keep_text

# Every weight stands for one network and is part of the run folder's name; published chains have
# three.
_MAX_LIST_LENGTH = 32


# Hydra's flags without and with a value.
_HYDRA_FLAGS = {
    "-h", "--help", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m",
    "-e", "--experimental-rerun", "-i", "--info", "-s", "--shell-completion",
}  # fmt: skip
_HYDRA_VALUES = {
    "-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd",
    "--config-dir",
}  # fmt: skip


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether the arguments ask for help."""
    return not {"-h", "--help"}.isdisjoint(arguments)


def from_flags(
    arguments: Sequence[str], schema: Any = RunConfig, *, hydra: bool = True
) -> list[str]:
    """Convert ``--option value`` and ``--option=value`` to ``option=value``.

    Args:
        arguments: command-line arguments.
        schema: dataclass of the command's options. A boolean flag without a value means ``true``.
            Defaults to :class:`~pogo_torchrl.experiments.config.RunConfig`.
        hydra: whether to keep Hydra's own flags, which come first in the result: Hydra does not
            accept them between options. Defaults to ``True``.

    Returns:
        The converted arguments.

    Raises:
        ValueError: for an unknown flag, or a flag without its value.

    Example:
        >>> from_flags(["--seed", "3", "--data.source=minari", "--resume", "lr=1e-4"])
        ['seed=3', 'data.source=minari', 'resume=true', 'lr=1e-4']
    """
    known = {name: hint for name, _, hint, _ in iter_options(schema)}
    flags: list[str] = []
    found: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.partition("=")
        if not flag.startswith("-"):
            found.append(argument)
            continue
        if hydra and flag in _HYDRA_FLAGS | _HYDRA_VALUES:
            flags.append(argument)
            if flag in _HYDRA_VALUES and not equals and rest:
                flags.append(rest.pop(0))
            continue
        name = flag.lstrip("-").replace("-", "_")
        check_name(name, known)
        if not equals:
            if rest and not rest[0].startswith("--") and "=" not in rest[0]:
                value = rest.pop(0)
            elif known[name] is bool:
                value = "true"
            else:
                raise ValueError(f"{flag} needs a value: write {name}=VALUE.")
        found.append(f"{name}={value}")
    return [*flags, *found]


def check_name(name: str, known: Collection[str]) -> None:
    """Check that an option exists.

    Args:
        name: name of the option.
        known: names of all options.

    Raises:
        ValueError: if it does not; the message suggests similar names.
    """
    if name not in known:
        near = [option for option in known if option.startswith(f"{name}.")]  # of a section
        near = near or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown option {name!r}; {hint}(--help lists all)")


def parse_options(arguments: Sequence[str], defaults: Any, *positional: str) -> DictConfig:
    """Parse the options of a command without Hydra; values need no quoting.

    Args:
        arguments: ``option=value``, ``--option value`` or, for ``positional``, the value alone.
        defaults: instance of the dataclass of the options.
        *positional: options whose names may be omitted, in their order.

    Returns:
        The options as a structured config.

    Raises:
        ValueError: for an unknown option or an invalid value.

    Example:
        >>> from pogo_torchrl.experiments.config import EnvConfig
        >>> parse_options(["--id", "Hopper-v5", "max_episode_steps=50"], EnvConfig())
        {'backend': 'mujoco', 'id': 'Hopper-v5', 'kwargs': {}, 'max_episode_steps': 50, \
'reference_scores': None, 'action_bounds': None}
    """
    cfg, schema = OmegaConf.structured(defaults), type(defaults)
    known = {name: (hint, default) for name, _, hint, default in iter_options(schema)}
    unnamed = list(positional)
    for argument in from_flags(arguments, schema, hydra=False):
        name, equals, value = argument.partition("=")
        if name not in known and unnamed and (not equals or not name.isidentifier()):
            name, value = unnamed.pop(0), argument
        elif not equals:
            raise ValueError(f"cannot parse {argument}: write option=value (--help lists all).")
        check_name(name, known)
        if not value:
            raise ValueError(f"{name} needs a value: write {name}=VALUE.")
        try:
            parsed = _parse_value(value, known[name][0])
            OmegaConf.update(cfg, name, fill_braces(parsed, schema) if parsed == value else parsed)
        except (OmegaConfBaseException, HydraException) as error:
            raise ValueError(_type_error(name, value, *known[name])) from error
    check_options(cfg, schema)
    expand_paths(cfg, schema)
    return cfg


def _parse_value(text: str, hint: Any) -> Any:
    """Value of an option's text: lists and mappings in Hydra's syntax, other text as it is."""
    if text == "null":
        return None
    if hint in (list[float] | None, list[Any] | None, dict[str, Any]):
        return OverridesParser.create().parse_override(f"value={text}").value()
    return text


def _type_error(name: str, text: str, hint: Any, default: Any) -> str:
    """Message for a value of the wrong type."""
    example = f", e.g. {to_text(default)}" if default is not None else ""
    return f"{name}={text} must be {_describe_type(hint)}{example}."


_HYDRA_LOCK = threading.Lock()


@contextmanager
def _outside_hydra() -> Iterator[None]:
    """Set Hydra's global state, if any, aside: the caller may be a Hydra application itself."""
    with _HYDRA_LOCK:
        outer, version = GlobalHydra.instance(), VersionBase.instance()
        state = outer.hydra, version.version_base
        outer.clear()
        try:
            yield
        finally:
            GlobalHydra.set_instance(outer)
            outer.hydra, version.version_base = state


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration of a run as the command line does.

    It may be called within a Hydra application and from any thread.

    Args:
        overrides: options as ``option=value``.

    Returns:
        A :class:`~pogo_torchrl.experiments.config.RunConfig`.

    Raises:
        ValueError: for invalid overrides, see :func:`check_overrides`.

    Example:
        >>> compose(["task=antmaze-umaze-v2", "seed=3"]).lr
        0.0001
    """
    overrides = resolve_task(overrides, check_overrides)
    check_overrides(overrides)
    with (
        _outside_hydra(),
        initialize_config_module("pogo_torchrl.experiments.conf", version_base="1.3"),
    ):
        cfg = hydra_compose("config", overrides=keep_text(overrides))
    expand_paths(cfg)
    return cfg


def sweep_options(arguments: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """Separate the options of a sweep from those of its runs.

    Args:
        arguments: options as ``option=value``.

    Returns:
        The :class:`~pogo_torchrl.experiments.config.SweepConfig` of the sweep's own options, and
        the remaining arguments.

    Raises:
        ValueError: for invalid options, see :func:`check_overrides` and :func:`check_options`.

    Example:
        >>> options, others = sweep_options(["sweep=antmaze", "lr=1e-4", "jobs=2"])
        >>> options.sweep, options.jobs, others
        ('antmaze', 2, ['lr=1e-4'])
    """
    check_overrides(arguments, SweepConfig)
    run_options, others = set(top_level_options()), []
    cfg = OmegaConf.structured(SweepConfig)
    for argument in arguments:
        override = OverridesParser.create().parse_override(*keep_text([argument], SweepConfig))
        if override.is_hydra_override() or override.key_or_group.split(".")[0] in run_options:
            others.append(argument)
        else:
            OmegaConf.update(cfg, override.key_or_group, override.value())
    check_options(cfg, SweepConfig)
    expand_paths(cfg, SweepConfig)
    return cfg, others


def check_options(cfg: DictConfig, schema: type = RunConfig) -> None:
    """Check the ranges of integers, the lengths of lists, and that all numbers are finite.

    Constraints specific to the loss, the trainer or the data are checked there.

    Args:
        cfg: the options.
        schema: dataclass of the options. Defaults to
            :class:`~pogo_torchrl.experiments.config.RunConfig`.

    Raises:
        ValueError: naming the option, its value and the allowed values.

    Example:
        >>> check_options(OmegaConf.structured(RunConfig(eval_episodes=0)))
        Traceback (most recent call last):
            ...
        ValueError: eval_episodes=0 must be an integer from 1 to 10000, e.g. 10.
    """
    for name, entry, hint, default in iter_options(schema):
        try:
            value = OmegaConf.select(cfg, name, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ValueError(
                f"{name} cannot be read ({str(error).splitlines()[0]}); give a value, e.g. "
                f"{default}."
            ) from error
        elements = [value]
        if OmegaConf.is_list(value):
            elements = list(value)
            # A chain on top of another algorithm may be empty.
            empty = name == "w2_weights" and cfg.algorithm != "pogo"
            if not (1 - empty) <= len(elements) <= _MAX_LIST_LENGTH:
                raise ValueError(
                    f"{name}={value} has {len(elements)} values; give 1 to {_MAX_LIST_LENGTH}, "
                    f"e.g. {default}."
                )
            if hint == list[Any] | None:  # checked where it is used
                continue
            if any(map(OmegaConf.is_config, elements)):  # OmegaConf 2.3.1 accepts them
                raise ValueError(_type_error(name, to_text(value), hint, default))
        lowest, highest = entry.metadata["lowest"], entry.metadata["highest"]
        for element in elements:
            if isinstance(element, float) and not math.isfinite(element):
                raise ValueError(f"{name}={value} must be finite, e.g. {default}.")
            if not isinstance(element, int) or isinstance(element, bool):
                continue
            if element < lowest or (highest is not None and element > highest):
                allowed = f">= {lowest}" if highest is None else f"from {lowest} to {highest}"
                advice = f", e.g. {default}" if default is not None else "; leave it out for null"
                raise ValueError(f"{name}={value} must be an integer {allowed}{advice}.")


def check_overrides(arguments: Sequence[str], schema: type = RunConfig) -> None:
    """Check the names and types of options before Hydra does, with clearer errors.

    Args:
        arguments: options as ``option=value``; Hydra's own flags are ignored.
        schema: dataclass of the options. Defaults to
            :class:`~pogo_torchrl.experiments.config.RunConfig`.

    Raises:
        ValueError: naming the option, and either similar names or the expected type of its value.

    Example:
        >>> check_overrides(["total_step=10"])
        Traceback (most recent call last):
            ...
        ValueError: unknown option 'total_step'; did you mean total_steps? (--help lists all)
        >>> check_overrides(["total_steps=many"])
        Traceback (most recent call last):
            ...
        ValueError: total_steps=many must be an integer, e.g. 3000.
    """
    parser = OverridesParser.create()
    arguments = keep_text(arguments, schema)
    cfg = OmegaConf.structured(schema)
    for previous, argument in zip(("", *arguments), arguments):
        if argument.startswith("-") or (previous.startswith("-") and "=" not in argument):
            continue  # Hydra's flags and their values
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            raise ValueError(
                f"cannot parse {argument}: write option=value, with quotes around values that "
                f"contain special characters, e.g. 'data.path=\"a=b.hdf5\"' (--help lists all)"
            ) from error
        if not override.is_hydra_override():
            _check_override(override, schema, cfg, is_multirun(arguments))
    keys = {argument.partition("=")[0] for argument in arguments}
    if {"step_sizes", "w2_weights"} <= keys:
        raise ValueError("step_sizes set w2_weights; give one of the two.")


def _check_override(override: Override, schema: type, cfg: DictConfig, multirun: bool) -> None:
    key, line = override.key_or_group, str(override.input_line)
    known = {name: (hint, default) for name, _, hint, default in iter_options(schema)}
    if key.startswith("env.kwargs."):
        return  # any argument of the user's environment
    if key != "data":
        check_name(key or line, known)
    if override.type not in (OverrideType.CHANGE, OverrideType.FORCE_ADD) or override.package:
        raise ValueError(
            f"{line} is not supported, options cannot be added, removed or moved: write "
            f"{key}=VALUE."
        )
    values = [override.value()]
    texts = [line.partition("=")[2]]
    if override.is_sweep_override():
        if not multirun:
            raise ValueError(
                f"{line} has several values: give one, write a list as [a,b], put quotes around "
                "text that contains commas, or add --multirun to start one run per value."
            )
        if not (override.is_choice_sweep() or override.is_range_sweep()):
            return
        found = override.sweep_iterator()
        values = [value.text if isinstance(value, QuotedString) else value for value in found]
        texts = [to_text(value) for value in values]
    for value, text in zip(values, texts):
        if key == "task":
            _check_task(text.strip("'\" "))
            continue
        if key == "algorithm" and (name := text.strip("'\" ")) not in algorithms():
            raise ValueError(
                f"algorithm={name} is unknown; choose one of {', '.join(algorithms())}."
            )
        try:
            OmegaConf.update(cfg, key, value)
            # OmegaConf converts every integer to a boolean.
            if known.get(key, (None,))[0] is bool and type(value) is int and value not in (0, 1):
                raise ValueError("not a boolean")
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            if key not in known:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"{line} is not valid ({reason}): write {key}.OPTION=VALUE."
                ) from error
            raise ValueError(_type_error(key, text, *known[key])) from error


def _describe_type(hint: Any) -> str:
    """Description of a type for error messages."""
    descriptions = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        list[int]: "a list of integers",
        list[float]: "a list of numbers",
        list[str] | None: "a list of texts or null",
        list[int] | None: "a list of integers or null",
        list[float] | None: "a list of numbers or null",
        list[Any] | None: "a list or null",
        int | None: "an integer or null",
        float | None: "a number or null",
        str | None: "text or null",
        dict[str, Any]: "a mapping of options to values, {option: value}",
    }
    return descriptions[hint]


def _check_task(task: str) -> None:
    if task not in (*all_tasks(), *own_tasks()):
        from pogo_torchrl.envs.families import other_family  # loads MuJoCo

        if reason := other_family(task):
            raise ValueError(reason)
        near = difflib.get_close_matches(task, all_tasks(), n=3, cutoff=0.3) or tasks()
        raise ValueError(
            f"task={task} is unknown; did you mean {' or '.join(near)}? For a task of your own, "
            "also set env.id."
        )
