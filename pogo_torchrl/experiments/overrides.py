"""Options as they are written on the command line: read and checked before any work."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pogo_torchrl.experiments.config import (
    RunConfig,
    SweepConfig,
    iter_options,
    tasks,
    to_text,
    top_level_options,
)

# The chain's weights name the run's folder, and each is a network; the papers' chains have three.
_MAX_LIST_LENGTH = 32


# Hydra's flags, and those that take a value.
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
    """Arguments with every ``--option value`` and ``--option=value`` as ``option=value``.

    Args:
        arguments: of the command line.
        schema: the dataclass of the command's options. A flag that is true or false may go without
            a value, which is then true.
        hydra: leave Hydra's own flags as they are. Defaults to ``True``.

    Raises:
        ValueError: for an unknown flag, and one without its value.

    Example:
        >>> from_flags(["--seed", "3", "--data.source=minari", "--resume", "lr=1e-4"])
        ['seed=3', 'data.source=minari', 'resume=true', 'lr=1e-4']
    """
    known = {name: hint for name, _, hint, _ in iter_options(schema)}
    found: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.partition("=")
        if not flag.startswith("-"):
            found.append(argument)
            continue
        if hydra and flag in _HYDRA_FLAGS | _HYDRA_VALUES:
            found.append(argument)
            if flag in _HYDRA_VALUES and not equals and rest:
                found.append(rest.pop(0))
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
    return found


def check_name(name: str, known: Collection[str]) -> None:
    """Check that an option exists.

    Raises:
        ValueError: naming it and those with similar names.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown option {name!r}; {hint}(--help lists all)")


def parse_options(arguments: Sequence[str], defaults: Any, positional: str = "") -> DictConfig:
    """The options of a command without Hydra: the values are taken as they are, without quotes.

    Args:
        arguments: ``option=value``, ``--option value`` or, for one of them, the value alone.
        defaults: an instance of the dataclass of the options.
        positional: name of the option that may stand without its name. Defaults to none.

    Raises:
        ValueError: for an unknown option, or a value that does not fit.

    Example:
        >>> from pogo_torchrl.experiments.config import EnvConfig
        >>> parse_options(["--id", "Hopper-v5", "max_episode_steps=50"], EnvConfig())
        {'backend': 'mujoco', 'id': 'Hopper-v5', 'max_episode_steps': 50}
    """
    cfg, schema = OmegaConf.structured(defaults), type(defaults)
    known = {name: (hint, default) for name, _, hint, default in iter_options(schema)}
    for argument in from_flags(arguments, schema, hydra=False):
        name, equals, value = argument.partition("=")
        if name not in known and positional and (not equals or not name.isidentifier()):
            name, value, positional = positional, argument, ""
        elif not equals:
            raise ValueError(f"{argument} cannot be read: write option=value (--help lists all).")
        check_name(name, known)
        if not value:
            raise ValueError(f"{name} needs a value: write {name}=VALUE.")
        try:
            OmegaConf.update(cfg, name, None if value == "null" else value)
        except OmegaConfBaseException as error:
            raise ValueError(_wrong_value(name, value, *known[name])) from error
    check_options(cfg, schema)
    return cfg


def _wrong_value(name: str, text: str, hint: Any, default: Any) -> str:
    example = f", e.g. {to_text(default)}" if default is not None else ""
    return f"{name}={text} must be {_describe_type(hint)}{example}."


def compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration of a run, as the command line would compose it.

    Raises:
        ValueError: for what :func:`check_overrides` refuses.

    Example:
        >>> compose(["task=antmaze-umaze-v2", "seed=3"]).lr
        0.0001
    """
    check_overrides(overrides)
    with initialize_config_module("pogo_torchrl.experiments.conf", version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides))


def sweep_options(arguments: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """A :class:`SweepConfig` of the arguments that are a sweep's own, and those of its runs.

    Raises:
        ValueError: for what :func:`check_overrides` and :func:`check_options` refuse.

    Example:
        >>> options, others = sweep_options(["sweep=antmaze", "lr=1e-4", "jobs=2"])
        >>> options.sweep, options.jobs, others
        ('antmaze', 2, ['lr=1e-4'])
    """
    check_overrides(arguments, SweepConfig)
    of_runs, others = set(top_level_options()), []
    cfg = OmegaConf.structured(SweepConfig)
    for argument in arguments:
        override = OverridesParser.create().parse_override(argument)
        if override.is_hydra_override() or override.key_or_group.split(".")[0] in of_runs:
            others.append(argument)
        else:
            OmegaConf.update(cfg, override.key_or_group, override.value())
    check_options(cfg, SweepConfig)
    return cfg, others


def check_options(cfg: DictConfig, schema: type = RunConfig) -> None:
    """Refuse what no run can use.

    What an option means to the loss, the trainer or the data is checked where it is used.

    Raises:
        ValueError: naming the option, its value, and what is allowed.

    Example:
        >>> check_options(OmegaConf.structured(RunConfig(eval_episodes=0)))
        Traceback (most recent call last):
            ...
        ValueError: eval_episodes=0 must be an integer from 1 to 10000, e.g. 10.
    """
    for name, entry, _, default in iter_options(schema):
        try:
            value = OmegaConf.select(cfg, name, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ValueError(
                f"{name} cannot be read ({str(error).splitlines()[0]}); give a value, e.g. "
                f"{default}."
            ) from error
        numbers = [value]
        if OmegaConf.is_list(value):
            numbers = list(value)
            if not 1 <= len(numbers) <= _MAX_LIST_LENGTH:
                raise ValueError(
                    f"{name}={value} holds {len(numbers)} numbers; give 1 to {_MAX_LIST_LENGTH}, "
                    f"e.g. {default}."
                )
        lowest, highest = entry.metadata["lowest"], entry.metadata["highest"]
        for number in numbers:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name}={value} must be finite, e.g. {default}.")
            if not isinstance(number, int) or isinstance(number, bool):
                continue
            if number < lowest or (highest is not None and number > highest):
                allowed = f">= {lowest}" if highest is None else f"from {lowest} to {highest}"
                hint = f", e.g. {default}" if default is not None else "; leave it out for null"
                raise ValueError(f"{name}={value} must be an integer {allowed}{hint}.")


def check_overrides(arguments: Sequence[str], schema: type = RunConfig) -> None:
    """Refuse unknown options and values of a wrong type on the command line, before Hydra does.

    Raises:
        ValueError: naming the option, and the nearest that exist or what its value should be.

    Example:
        >>> check_overrides(["total_step=10"])
        Traceback (most recent call last):
            ...
        ValueError: unknown option 'total_step'; did you mean total_steps? (--help lists all)
        >>> check_overrides(["total_steps=many"])
        Traceback (most recent call last):
            ...
        ValueError: total_steps=many must be an integer, e.g. 2000.
    """
    parser = OverridesParser.create()
    for before, argument in zip(("", *arguments), arguments):
        if argument.startswith("-") or (before.startswith("-") and "=" not in argument):
            continue  # Hydra's flags and their values
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            raise ValueError(
                f"{argument} cannot be read: write option=value, and quotes around a value with "
                f"special characters, e.g. 'data.path=\"a=b.hdf5\"' (--help lists the options)"
            ) from error
        if not override.is_hydra_override():
            several = not {"-m", "--multirun"}.isdisjoint(arguments)
            _check_override(override, schema, several)


def _check_override(override: Override, schema: type, several: bool) -> None:
    key, line = override.key_or_group, str(override.input_line)
    known = {name: (hint, default) for name, _, hint, default in iter_options(schema)}
    if key != "data":
        check_name(key or line, known)
    if override.type not in (OverrideType.CHANGE, OverrideType.FORCE_ADD) or override.package:
        raise ValueError(
            f"{line} is refused, options can be neither added, removed nor moved: write "
            f"{key}=VALUE."
        )
    values = [override.value()]
    texts = [line.partition("=")[2]]
    if override.is_sweep_override():
        if not several:
            raise ValueError(
                f"{line} holds several values: give one, write a list as [a,b], put quotes around "
                "a text with commas, or add --multirun for a run of each."
            )
        if not (override.is_choice_sweep() or override.is_range_sweep()):
            return
        values = list(override.sweep_iterator())
        texts = [to_text(value) for value in values]
    for value, text in zip(values, texts):
        if key == "task":
            _check_task(text.strip("'\" "))
            continue
        try:
            OmegaConf.update(OmegaConf.structured(schema), key, value)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            if key not in known:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"{line} does not fit ({reason}): write {key}.OPTION=VALUE."
                ) from error
            raise ValueError(_wrong_value(key, text, *known[key])) from error


def _describe_type(hint: Any) -> str:
    """What a value of this type is called."""
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        list[int]: "a list of integers",
        list[float]: "a list of numbers",
        int | None: "an integer or null",
        float | None: "a number or null",
        str | None: "text or null",
        dict[str, Any]: "options with their values, {option: value}",
    }
    return words[hint]


def _check_task(task: str) -> None:
    if task not in tasks():
        near = difflib.get_close_matches(task, tasks(), n=3, cutoff=0.3) or tasks()
        raise ValueError(f"task={task} is unknown; did you mean {' or '.join(near)}?")
