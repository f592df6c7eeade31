"""Options in YAML files: reading, and conversion to those of the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf.errors import OmegaConfBaseException

from pogo_torchrl.experiments.config import RunConfig, iter_options
from pogo_torchrl.experiments.typed_text import load_yaml


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose content is a mapping.

    Args:
        path: the file.

    Raises:
        ValueError: if it cannot be read, is not valid YAML, or contains something else.
    """
    try:
        content = load_yaml(path.read_text("utf-8"))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {content} must be a mapping, key: value.")
    return {str(key): value for key, value in content.items()}


def flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten ``data: {size: 1}`` to ``data.size: 1``; options that are mappings stay whole.

    Args:
        section: options, possibly nested.
        prefix: prepended to the names. Defaults to ``""``.
    """
    mappings = {name for name, _, hint, _ in iter_options(RunConfig) if hint == dict[str, Any]}
    for key, value in section.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in mappings:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_override(value: Any) -> str:
    """Format a value as it is written on the command line.

    Args:
        value: a value of YAML.

    Example:
        >>> to_override({"goal": [1, 0.5], "name": "a b"})
        "{goal: [1,0.5],name: 'a b'}"
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(to_override, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}: {to_override(one)}' for key, one in value.items())}}}"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))  # 1e6 updates
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    return str(value)
