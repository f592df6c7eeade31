"""Sphinx directives that make the reference from the code.

``{options} module.Config`` makes a table of the options of a dataclass; those of nested dataclasses
follow in tables of their own. ``{command-help} command`` shows the help of a command of ``pogo``.
``{api} module`` lists and describes the public names of a module, or those named below it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from pogo_torchrl.cli import main
from pogo_torchrl.experiments.config import to_text

TYPES = {
    "str": "text",
    "int": "integer",
    "float": "number",
    "bool": "true or false",
    "None": "null",
    "list[float]": "list of numbers",
    "list[int]": "list of integers",
    "list[str]": "list of texts",
    "list[Any]": "list",
}


def type_text(hint: Any, metadata: dict[str, Any]) -> str:
    """Type of an option in words, with the range of an integer.

    Args:
        hint: type annotation of the field.
        metadata: metadata of the field.
    """
    name = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
    names = [part.strip() for part in re.split(r" \| ", name)]
    words = [TYPES.get(part, "mapping" if part.startswith("dict") else part) for part in names]
    if "integer" in words:
        low, high = metadata["lowest"], metadata["highest"]
        allowed = f"integer ≥ {low}" if high is None else f"integer from {low} to {high}"
        words[words.index("integer")] = allowed
    return " or ".join(words)


class OptionTables(SphinxDirective):
    """Tables of the options of a dataclass, without those of the dataclasses it extends."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the tables, nested dataclasses after the others."""
        module, name = self.arguments[0].rsplit(".", 1)
        return list(self._tables(getattr(importlib.import_module(module), name)))

    def _tables(self, schema: type, prefix: str = "") -> Iterator[nodes.Node]:
        inherited = {f.name for b in schema.__bases__ if dataclasses.is_dataclass(b)
                     for f in dataclasses.fields(b)}  # fmt: skip
        hints = get_type_hints(schema)
        rows, nested = [], []
        for entry in dataclasses.fields(schema):
            if entry.name in inherited:
                continue
            factory = entry.default_factory
            default = entry.default if factory is dataclasses.MISSING else factory()
            if dataclasses.is_dataclass(default):
                nested.append((type(default), f"{prefix}{entry.name}."))
                continue
            rows.append((prefix + entry.name, type_text(hints[entry.name], dict(entry.metadata)),
                         to_text(default), entry.metadata["help"]))  # fmt: skip
        if prefix:
            title = f"``{prefix}``: {(schema.__doc__ or '').splitlines()[0]}"
            yield nodes.rubric(title, "", *self.parse_inline(title)[0])
        yield self._table(rows)
        for inner, inner_prefix in nested:
            yield from self._tables(inner, inner_prefix)

    def _table(self, rows: list[tuple[str, str, str, str]]) -> nodes.table:
        group = nodes.tgroup(cols=4)
        group += [nodes.colspec(colwidth=width) for width in (20, 15, 15, 50)]
        head = nodes.row("", *(_cell(nodes.Text(t)) for t in ("option", "type", "default", "")))
        body = nodes.tbody()
        for name, kind, default, meaning in rows:
            target = nodes.make_id(f"option-{name}")
            row = nodes.row("", ids=[target])
            row += [_cell(nodes.literal(name, name)), _cell(nodes.Text(kind))]
            row += [_cell(nodes.literal(default, default)), _cell(nodes.Text(meaning))]
            body += row
        group += [nodes.thead("", head), body]
        return nodes.table("", group, classes=["options"])


def _cell(node: nodes.Node) -> nodes.entry:
    return nodes.entry("", nodes.paragraph("", "", node))


class CommandHelp(SphinxDirective):
    """The help of a command of ``pogo``, as the terminal shows it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the help as a code block of 88 columns."""
        columns, text = os.environ.get("COLUMNS"), io.StringIO()
        os.environ["COLUMNS"] = "88"
        try:
            with contextlib.redirect_stdout(text):
                main([self.arguments[0], "--help"])
        finally:
            os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
        return [nodes.literal_block(text.getvalue(), text.getvalue().rstrip(), language="text")]


class API(SphinxDirective):
    """The public names of a module: a list with links, then their docstrings."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the parsed ``autosummary`` and ``automodule``."""
        module = importlib.import_module(self.arguments[0])
        names = (
            list(self.content)
            or list(getattr(module, "__all__", ()))
            or [
                name
                for name, value in vars(module).items()
                if getattr(value, "__module__", None) == module.__name__
                and not name.startswith("_")
            ]
        )
        listed = "".join(f"   {name}\n" for name in names if not name.isupper())
        summary = f".. autosummary::\n\n{listed}\n" if listed else ""
        text = (
            f"```{{eval-rst}}\n.. currentmodule:: {module.__name__}\n\n{summary}"
            f".. automodule:: {module.__name__}\n   :members: {', '.join(names)}\n```\n"
        )
        return self.parse_text_to_nodes(text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("options", OptionTables)
    app.add_directive("command-help", CommandHelp)
    app.add_directive("api", API)
    return {"parallel_read_safe": True}
