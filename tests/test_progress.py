"""Progress bars: on a terminal, in log files, and not at all."""

from __future__ import annotations

import io
import sys

import pytest

from pogo_torchrl import progress
from pogo_torchrl.data import behaviour_dataset, make_replay_buffer
from pogo_torchrl.data.download import download
from pogo_torchrl.progress import progress_bar


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def shown(monkeypatch):
    """Run a bar of many steps and return what it has written."""

    def show(terminal: bool, **settings) -> str:
        stream = Stream(terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(total=2000, desc="work", **settings) as bar:
            for _ in range(2000):
                bar.update()
        return stream.getvalue()

    return show


def test_a_log_file_gets_lines_at_the_start_and_at_the_end(shown):
    text = shown(terminal=False)
    assert "\r" not in text
    first, last = text.splitlines()
    assert first.startswith("work:   0%")
    assert last.startswith("work: 100%")


def test_a_log_file_gets_a_line_per_interval(shown, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_PER_LINE", 0.0)
    lines = shown(terminal=False, miniters=1000).splitlines()
    assert [line.partition("|")[0] for line in lines] == [
        "work:   0%", "work:  50%", "work: 100%", "work: 100%",
    ]  # fmt: skip


def test_a_terminal_is_redrawn(shown):
    text = shown(terminal=True)
    assert text.startswith("\r")
    assert text.count("\n") == 1


def test_a_disabled_bar_writes_nothing(shown, monkeypatch):
    assert shown(terminal=True, disable=True) == ""
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(total=1) as bar:
        bar.update()


def test_no_bars_of_data_and_downloads_without_progress_bar(tmp_path, capsys):
    make_replay_buffer("hopper-medium-v2", size=300, cache_dir=tmp_path, progress=False)
    behaviour_dataset("hopper-medium-v2", size=200, cache_dir=tmp_path, progress=False)
    (tmp_path / "a").write_text("x")
    download((tmp_path / "a").as_uri(), tmp_path / "b", progress=False)
    assert capsys.readouterr().err == ""
