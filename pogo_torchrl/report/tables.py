r"""Tables as Markdown, CSV and LaTeX.

Cells are text, integers, scores (with one decimal in print and four in CSV), a
:class:`~pogo_torchrl.report.Spread` or an :class:`~pogo_torchrl.report.Estimate`; ``None`` and NaN
are what there is nothing to say about.
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
    r"""Rows under a header, with a caption that says what the numbers are, and notes to it.

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
        """Caption and notes."""
        return " ".join([self.caption, *self.notes])

    def markdown(self) -> str:
        """The table alone, without caption and notes."""
        header = f"| {' | '.join(self.columns)} |"
        rule = "|---" * len(self.columns) + "|"
        body = ([_print(cell).replace("|", r"\|") for cell in row] for row in self.rows)
        return "\n".join([header, rule, *(f"| {' | '.join(cells)} |" for cells in body)])

    def csv(self) -> str:
        """Each number in a column of its own: ``_mean`` and ``_std``, ``_low`` and ``_high``."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        kinds = [_kind(column) for column in zip(*self.rows)]
        # Names for programs: π1 − π0 is pi1_minus_pi0.
        spelled = (name.replace("π", "pi").replace("−", "minus") for name in self.columns)
        names = [re.sub(r"\W+", "_", name).strip("_").lower() for name in spelled]
        writer.writerow(
            f"{name}{ending}" for name, kind in zip(names, kinds) for ending in _ENDINGS[kind]
        )
        for row in self.rows:
            cells = []
            for cell, kind in zip(row, kinds):
                parts = cell if isinstance(cell, Spread | Estimate) else [cell]
                cells += [_number(part, 4) for part in parts]
                cells += [""] * (len(_ENDINGS[kind]) - len(parts))
            writer.writerow(cells)
        return file.getvalue()

    def latex(self) -> str:
        """A ``table`` environment, for the package booktabs."""
        kinds = [_kind(column) for column in zip(*self.rows)]
        alignment = "".join("l" if kind is str else "r" for kind in kinds)
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


_ENDINGS: dict[type, tuple[str, ...]] = {
    Spread: ("_mean", "_std"),
    Estimate: ("", "_low", "_high"),
    str: ("",),
    float: ("",),
}


def _kind(cells: Sequence[Cell]) -> type:
    """What a column holds: text, numbers, or one of the two kinds of several numbers."""
    for kind in (Spread, Estimate, str):
        if any(isinstance(cell, kind) for cell in cells):
            return kind
    return float


def _number(cell: object, decimals: int) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    # Adding zero turns -0.0 into 0.0.
    return f"{round(cell, decimals) + 0:.{decimals}f}" if isinstance(cell, float) else str(cell)


def _print(cell: Cell) -> str:
    """As people read it."""
    parts = [_number(x, 1) for x in (cell if isinstance(cell, Spread | Estimate) else [cell])]
    if isinstance(cell, Spread) and parts[1]:
        return f"{parts[0]} ± {parts[1]}"
    if isinstance(cell, Estimate) and parts[1]:
        return f"{parts[0]} [{parts[1]}, {parts[2]}]"
    return parts[0] or "–"


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def _tex_cell(cell: Cell) -> str:
    text = _print(cell)
    if isinstance(cell, str) or text == "–":
        return _tex(text)
    return f"${text.replace('±', chr(92) + 'pm')}$"
