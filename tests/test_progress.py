"""Progress bars of long work: on a terminal, once, on the first rank."""

from __future__ import annotations

import io
import sys

import pytest

from megatron_mup.progress import bar, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch) -> Terminal:
    """Puts one in the place of standard error; called in the test's body, for pytest puts its own there before."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("RANK", raising=False)
    return screen


def test_a_bar_on_a_terminal(monkeypatch):
    screen = terminal(monkeypatch)
    assert list(track([1, 2, 3], "merging")) == [1, 2, 3]
    assert "merging" in screen.getvalue()
    assert "3/3" in screen.getvalue()


def test_items_without_a_length(monkeypatch):
    screen = terminal(monkeypatch)
    assert list(track(iter("ab"), "reading", total=2)) == ["a", "b"]
    assert "2/2" in screen.getvalue()


def test_a_bar_inside_another_is_silent(monkeypatch):
    screen = terminal(monkeypatch)
    for _ in track([1, 2], "outer"):
        assert list(track([3], "inner")) == [3]
    assert "inner" not in screen.getvalue()
    list(track([1], "next"))
    assert "next" in screen.getvalue()


def test_an_error_ends_the_bar(monkeypatch):
    screen = terminal(monkeypatch)
    with pytest.raises(KeyError), bar("broken", 2):
        raise KeyError
    list(track([1], "next"))
    assert "next" in screen.getvalue()


def test_other_ranks_and_files_see_nothing(monkeypatch):
    screen = terminal(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    assert list(track([1], "merging")) == [1]
    assert screen.getvalue() == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(track([1], "merging")) == [1]
    assert sys.stderr.getvalue() == ""
