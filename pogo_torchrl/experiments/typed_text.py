"""Text options keep the text that was typed; `~` and variables are expanded in paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pogo_torchrl.experiments.config import RunConfig, iter_options
from pogo_torchrl.experiments.multirun import is_multirun

_NULLS = {"null", "Null", "NULL", "~", ""}

# Left to Hydra and OmegaConf: null, quoted text, lists and mappings, functions such as choice(a,b),
# interpolations such as ${oc.env:HOME}, and a second =, which may be a forgotten space.
_NOT_PLAIN = re.compile(r"""(null$|$|['"\[{]|\w+\(.*\)$|.*(\$\{|=))""", re.DOTALL)

_BRACES = re.compile(r"\$\{(\w+)\}")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def keep_text(arguments: Sequence[str], schema: type = RunConfig) -> list[str]:
    """Put quotes around the values of text options, which Hydra would read as numbers or reject.

    Args:
        arguments: options as ``option=value``, and Hydra's flags.
        schema: dataclass of the options. Defaults to
            :class:`~pogo_torchrl.experiments.config.RunConfig`.

    Returns:
        The arguments. With ``--multirun``, each of several values has its own quotes.

    Example:
        >>> keep_text(["log_dir=2024_11_28", "data.path=~/a (1).hdf5", "seed=3", "data.path=null"])
        ["log_dir='2024_11_28'", "data.path='~/a (1).hdf5'", 'seed=3', 'data.path=null']
        >>> keep_text(["-m", "log_dir=1.10,1e3"])
        ['-m', "log_dir='1.10','1e3'"]
    """
    kept = []
    texts = set(_text_options(schema)) - {"task"}  # a group of Hydra
    several = is_multirun(arguments)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in texts:
            value = fill_braces(value, schema)
            argument = f"{name}{equals}{value}"
        parts = value.split(",")
        if (
            name in texts
            and equals
            and not any(map(_NOT_PLAIN.match, parts))
            and (several or len(parts) == 1)
        ):
            quoted = [QuotedString(part, Quote.single).with_quotes() for part in parts]
            argument = f"{name}={','.join(quoted)}"
        kept.append(argument)
    return kept


def load_yaml(text: str, schema: type = RunConfig) -> Any:
    """Read YAML, in which the values of text options are text, and numbers may be ``3e-4``.

    Args:
        text: the YAML. Its keys are options, possibly within further mappings.
        schema: dataclass of the options. Defaults to
            :class:`~pogo_torchrl.experiments.config.RunConfig`.

    Returns:
        The content, with interpolations resolved.

    Raises:
        yaml.YAMLError: if it is not valid YAML.
        omegaconf.errors.OmegaConfBaseException: for invalid interpolations.

    Example:
        >>> load_yaml("common: {log_dir: 2024_11_28, data: {path: 1.10}, lr: 3e-4}")
        {'common': {'log_dir': '2024_11_28', 'data': {'path': '1.10'}, 'lr': 0.0003}}
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return None
    _mark_text(root, "", set(_text_options(schema)))
    # OmegaConf reads 3e-4 as a number, unlike PyYAML, and rejects duplicate keys.
    content = OmegaConf.create(yaml.serialize(root, allow_unicode=True))
    return OmegaConf.to_container(content, resolve=True)


def fill_braces(text: str, schema: type = RunConfig) -> str:
    """Replace ``${HOME}`` and the like, which OmegaConf would take for the names of options.

    Example:
        >>> fill_braces("${HOME}/${log_dir}") == os.environ["HOME"] + "/${log_dir}"
        True
    """
    known = {name for name, *_ in iter_options(schema)}
    return _BRACES.sub(
        lambda found: found[0] if found[1] in known else os.environ.get(found[1], found[0]), text
    )


def _mark_text(node: yaml.Node, path: str, texts: set[str]) -> None:
    """Give the plain values of text options the type of a string."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _mark_text(value, f"{path}.{key.value}", texts)
    elif isinstance(node, yaml.SequenceNode):
        for element in node.value:
            _mark_text(element, path, texts)
    elif isinstance(node, yaml.ScalarNode) and (node.style or node.value not in _NULLS):
        parts = path.split(".")
        if any(".".join(parts[i:]) in texts for i in range(len(parts))):
            node.tag, node.style = "tag:yaml.org,2002:str", node.style or "'"
            node.value = fill_braces(node.value)


def _text_options(schema: type) -> Iterator[str]:
    for name, _, hint, _ in iter_options(schema):
        if hint in (str, str | None):
            yield name


def expand_paths(cfg: DictConfig, schema: type = RunConfig) -> None:
    """Expand ``~`` and environment variables in all options that are paths.

    Args:
        cfg: the options, which are changed.
        schema: dataclass of the options. Defaults to
            :class:`~pogo_torchrl.experiments.config.RunConfig`.

    Raises:
        ValueError: if a variable is not set, or the home folder is unknown.

    Example:
        >>> cfg = OmegaConf.structured(RunConfig(log_dir="~/logs"))
        >>> expand_paths(cfg)
        >>> cfg.log_dir.startswith("~")
        False
    """
    for name, entry, _, _ in iter_options(schema):
        if not entry.metadata["path"]:
            continue
        try:
            value = OmegaConf.select(cfg, name)
        except OmegaConfBaseException:  # reported by check_options
            continue
        if isinstance(value, str):
            expanded = expand_path(name, value)
            if expanded != value:
                OmegaConf.update(cfg, name, expanded)


def expand_path(name: str, text: str) -> str:
    """Expand ``~`` and environment variables in the value of an option; URLs stay as they are.

    Args:
        name: name of the option, for messages.
        text: the value.

    Raises:
        ValueError: if a variable is not set, or the home folder is unknown.
    """
    if "://" in text or os.path.lexists(text):
        return text
    expanded = os.path.expandvars(os.path.expanduser(text))
    if expanded.startswith(("~/", "~" + os.sep)) or expanded == "~":
        raise ValueError(f"{name}={text}: the home folder is unknown; write the path in full.")
    missing = [a or b for a, b in _VARIABLE.findall(text) if (a or b) not in os.environ]
    if missing:
        raise ValueError(
            f"{name}={text}: the environment variable {missing[0]} is not set; set it, or write "
            "the path in full."
        )
    return expanded
