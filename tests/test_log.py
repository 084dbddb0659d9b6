"""What is said while a step goes on: a line that moves on a terminal, plain lines in a pipe."""

import io
import logging
import re
import sys
import threading
import time

import pytest

from sae_runner import log as module
from sae_runner.errors import Interrupted
from sae_runner.log import ERASE, Progress, foot, log_to, setup_logging, speaking, working


class Terminal(io.StringIO):
    """Standard error as a terminal; `screen` is what a reader sees in the end."""

    def isatty(self):
        return True

    @property
    def screen(self):
        lines = [""]
        for part in re.split(r"(\r|\n|\x1b\[K)", self.getvalue()):
            if part == "\n":
                lines.append("")
            elif part == "\x1b[K":
                lines[-1] = ""
            elif part != "\r":
                lines[-1] = part
        return "\n".join(lines)


def terminal_of(monkeypatch, quiet_s=0.1):
    """Not a fixture: pytest sets standard error anew between its phases."""
    monkeypatch.setattr(module, "QUIET_S", quiet_s)
    monkeypatch.setattr(sys, "stderr", fake := Terminal())
    return fake


def shown_within(terminal, text, seconds=5.0):
    end = time.monotonic() + seconds
    while text not in terminal.getvalue():
        assert time.monotonic() < end, f"no {text!r} in {terminal.getvalue()!r}"
        time.sleep(0.02)


def test_a_step_that_stands_in_one_call_is_shown_and_leaves_no_trace(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with Progress("count", 8, "sheep") as progress:
        progress.advance(2, "asleep")
        shown_within(terminal, "\rcount 2/8 sheep, 25%, ")
        shown_within(terminal, " left, asleep")
    assert terminal.screen == "" and terminal.getvalue().endswith("\r" + ERASE)


def test_without_a_total_the_time_is_shown(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with working("thinking"):
        shown_within(terminal, "\rthinking, 0.")
    assert terminal.screen == ""


def test_short_steps_are_silent(monkeypatch):
    terminal = terminal_of(monkeypatch, quiet_s=60)
    with working("thinking"), Progress("count", 8, "sheep") as progress:
        progress.advance(8)
        time.sleep(0.5)
    assert terminal.getvalue() == ""


def test_the_step_begun_last_is_shown_and_then_the_one_around_it(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with working("outer"):
        shown_within(terminal, "\router, ")
        with working("inner"):
            shown_within(terminal, "\rinner, ")
        said = len(terminal.getvalue())
        while "\router, " not in terminal.getvalue()[said:]:
            time.sleep(0.02)
    assert terminal.screen == ""


def test_a_stop_leaves_no_half_line(monkeypatch):
    terminal = terminal_of(monkeypatch)

    def count():
        with Progress("count", 8, "sheep"):
            shown_within(terminal, "\rcount 0/8 sheep")
            terminal.write("^C")  # What the terminal itself echoes.
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        count()
    assert terminal.screen == ""
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_what_is_begun_and_never_ended_ends_with_the_command(monkeypatch):
    terminal = terminal_of(monkeypatch)
    Progress("count", 8, "sheep")
    Progress("dream", 8, "sheep")
    shown_within(terminal, "\rdream")
    foot.end()
    assert terminal.screen == "" and foot.open == []


def test_log_lines_stand_above_it(monkeypatch):
    terminal = terminal_of(monkeypatch)
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        setup_logging()
        with Progress("count", 8, "sheep"):
            shown_within(terminal, "\rcount")
            logging.getLogger("sae_runner").info("a word")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        logging.captureWarnings(False)
    assert "count" not in terminal.screen and "a word" in terminal.screen


def test_the_line_is_no_wider_than_the_terminal(monkeypatch):
    terminal = terminal_of(monkeypatch)
    monkeypatch.setenv("COLUMNS", "20")
    with Progress("count", 1_000_000, "sheep"):
        shown_within(terminal, "\rcount 0/1,000,000 s" + ERASE)


def test_a_terminal_that_was_closed_ends_nothing(monkeypatch):
    terminal = terminal_of(monkeypatch)

    def gone(*_, **__):
        raise OSError(5, "Input/output error")

    with Progress("count", 8, "sheep"):
        shown_within(terminal, "\rcount")
        monkeypatch.setattr(terminal, "write", gone)


def heard_within(caplog, text, seconds=5.0):
    end = time.monotonic() + seconds
    while text not in caplog.text:
        assert time.monotonic() < end, f"no {text!r} in {caplog.text!r}"
        time.sleep(0.02)


def test_in_a_pipe_a_line_comes_after_two_seconds_and_then_every_ten(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module, "foot", module.Foot())
    monkeypatch.setattr(module.Foot, "_keep_painting", lambda *_: None)
    caplog.set_level(logging.INFO, "sae_runner")
    with Progress("count", 40, "sheep") as progress:
        for second in range(1, 31):
            now[0] = float(second)
            progress.advance(1, "asleep" if second > 20 else "")
            progress.say()
    assert [record.message for record in caplog.records] == [
        "count 2/40 sheep, 5%, 1/s, 38.0s left",
        "count 12/40 sheep, 30%, 1/s, 28.0s left",
        "count 22/40 sheep, 55%, 1/s, 18.0s left, asleep",
    ]


def test_in_a_pipe_a_step_that_stands_in_one_call_is_spoken_of(monkeypatch, caplog):
    monkeypatch.setattr(module, "QUIET_S", 0.1)
    caplog.set_level(logging.INFO, "sae_runner")
    with working("thinking"):
        heard_within(caplog, "thinking, 0.")
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_in_a_pipe_what_is_spoken_of_goes_into_the_file_of_who_speaks(
    monkeypatch, caplog, tmp_path
):
    monkeypatch.setattr(module, "QUIET_S", 0.1)
    caplog.set_level(logging.INFO, "sae_runner")
    mine, other = tmp_path / "mine.log", tmp_path / "other.log"
    with log_to(mine), log_to(other), speaking(mine), working("thinking"):
        heard_within(caplog, "thinking, 0.")
    assert "thinking" in mine.read_text() and other.read_text() == ""
