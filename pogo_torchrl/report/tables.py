r"""Tables as Markdown, CSV and LaTeX.

A cell is text, an integer, a score (one decimal in print, four in CSV), a
:class:`~pogo_torchrl.report.Spread` or an :class:`~pogo_torchrl.report.Estimate`. ``None`` and NaN
are missing values.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from pogo_torchrl.report.intervals import Estimate, Spread

Cell = str | int | float | Spread | Estimate | None

_TEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "π": r"$\pi$", "±": r"$\pm$", "−": "$-$", "–": "--",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


class Table(NamedTuple):
    r"""A table with a header, a caption that defines its values, and notes.

    Args:
        name: name of the table's files.
        caption: defines the values shown.
        columns: the header.
        rows: the cells, row by row.
        notes: further sentences of the caption. Defaults to none.

    Example:
        >>> table = Table("scores", "Scores: 100 % = expert.", ("task", "last"),
        ...               [("hopper_1", Spread(61.25, 3.0)), ("b", Spread(-0.01, math.nan))])
        >>> print(table.markdown())
        | task | last |
        |---|---|
        | hopper_1 | 61.2 ± 3.0 |
        | b | 0.0 |
        >>> print(table.csv(), end="")
        task,last_mean,last_std
        hopper_1,61.2500,3.0000
        b,-0.0100,
        >>> print(table.latex(), end="")
        % \usepackage{booktabs}
        \begin{table}
          \centering
          \caption{Scores: 100 \% = expert.}
          \label{tab:scores}
          \begin{tabular}{lr}
            \toprule
            task & last \\
            \midrule
            hopper\_1 & $61.2 \pm 3.0$ \\
            b & $0.0$ \\
            \bottomrule
          \end{tabular}
        \end{table}
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    notes: tuple[str, ...] = ()

    @property
    def full_caption(self) -> str:
        """Caption and notes as one paragraph."""
        return " ".join([self.caption, *self.notes])

    def markdown(self) -> str:
        """Format the table as Markdown, without caption and notes."""
        header = f"| {' | '.join(self.columns)} |"
        rule = "|---" * len(self.columns) + "|"
        body = ([_format_cell(cell).replace("|", r"\|") for cell in row] for row in self.rows)
        return "\n".join([header, rule, *(f"| {' | '.join(cells)} |" for cells in body)])

    def csv(self) -> str:
        """Format the table as CSV, with one value per column.

        The parts of a cell go to columns with the suffixes ``_mean`` and ``_std``, or ``_low`` and
        ``_high`` next to the value.
        """
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        types = [_column_type(column) for column in zip(*self.rows)]
        # ASCII identifiers: π1 − π0 becomes pi1_minus_pi0.
        spellings = (name.replace("π", "pi").replace("−", "minus") for name in self.columns)
        names = [re.sub(r"\W+", "_", name).strip("_").lower() for name in spellings]
        writer.writerow(
            f"{name}{suffix}"
            for name, column_type in zip(names, types)
            for suffix in _SUFFIXES[column_type]
        )
        for row in self.rows:
            cells = []
            for cell, column_type in zip(row, types):
                parts = cell if isinstance(cell, Spread | Estimate) else [cell]
                cells += [_format_number(part, 4) for part in parts]
                cells += [""] * (len(_SUFFIXES[column_type]) - len(parts))
            writer.writerow(cells)
        return file.getvalue()

    def latex(self) -> str:
        """Format the table as a LaTeX ``table`` environment; requires the package booktabs."""
        types = [_column_type(column) for column in zip(*self.rows)]
        alignment = "".join("l" if column_type is str else "r" for column_type in types)
        lines = [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_tex(self.full_caption)}}}",
            rf"  \label{{tab:{self.name.replace('_', '-')}}}",
            rf"  \begin{{tabular}}{{{alignment}}}",
            r"    \toprule",
            rf"    {' & '.join(map(_tex, self.columns))} \\",
            r"    \midrule",
            *(rf"    {' & '.join(map(_tex_cell, row))} \\" for row in self.rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"


_SUFFIXES: dict[type, tuple[str, ...]] = {
    Spread: ("_mean", "_std"),
    Estimate: ("", "_low", "_high"),
    str: ("",),
    float: ("",),
}


def _column_type(cells: Sequence[Cell]) -> type:
    """Type of a column: ``Spread``, ``Estimate``, ``str``, or ``float`` for other numbers."""
    for column_type in (Spread, Estimate, str):
        if any(isinstance(cell, column_type) for cell in cells):
            return column_type
    return float


def _format_number(cell: object, decimals: int) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    # Adding zero turns -0.0 into 0.0.
    return f"{round(cell, decimals) + 0:.{decimals}f}" if isinstance(cell, float) else str(cell)


def _format_cell(cell: Cell) -> str:
    """Format a cell for reading."""
    parts = [
        _format_number(x, 1) for x in (cell if isinstance(cell, Spread | Estimate) else [cell])
    ]
    if isinstance(cell, Spread) and parts[1]:
        return f"{parts[0]} ± {parts[1]}"
    if isinstance(cell, Estimate) and parts[1]:
        return f"{parts[0]} [{parts[1]}, {parts[2]}]"
    return parts[0] or "–"


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def _tex_cell(cell: Cell) -> str:
    text = _format_cell(cell)
    if isinstance(cell, str) or text == "–":
        return _tex(text)
    return f"${text.replace('±', chr(92) + 'pm')}$"
