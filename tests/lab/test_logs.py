"""The log has one record a line for programs, and readable lines for people."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rocket.lab import logs

if TYPE_CHECKING:
    from collections.abc import Iterator

CREATED = 1_700_000_000.25
"""2023-11-14 22:13:20.250 UTC."""


@contextlib.contextmanager
def logged(log_format: str, *, worker: int | None = None) -> Iterator[io.StringIO]:
    """Collect what the program's log writes to standard output; put logging back as it was."""
    with contextlib.redirect_stdout(io.StringIO()) as output, logged_to(output, log_format, worker=worker):
        yield output


@contextlib.contextmanager
def logged_to(
    output: TextIO | None,
    log_format: str = "text",
    *,
    worker: int | None = None,
    most_waiting: int = logs.MOST_WAITING,
) -> Iterator[None]:
    """Have the program's log written to what is the standard output now."""
    assert output is sys.stdout
    loggers = [logging.getLogger(), logging.getLogger("rocket")]
    levels = [logger.level for logger in loggers]
    handlers = list(loggers[0].handlers)
    try:
        logs.configure(log_format, worker=worker, most_waiting=most_waiting)
        yield
    finally:
        loggers[0].handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def entries(output: io.StringIO) -> list[dict[str, Any]]:
    """Read the log as a program does: every line is ended, and each is one object."""
    *lines, rest = output.getvalue().split("\n")
    assert rest == ""
    return [json.loads(line) for line in lines]


def record_at(created: float, name: str = "rocket.api", level: int = logging.INFO) -> logging.LogRecord:
    """Return a record of a certain moment."""
    return logging.makeLogRecord(
        {
            "name": name,
            "levelno": level,
            "levelname": logging.getLevelName(level),
            "msg": "Reading ride %d from server '%s'",
            "args": (96, "replica0"),
            "created": created,
            "msecs": created % 1 * 1000,
        }
    )


# --- for people ---


def test_a_line_for_people_is_time_part_and_message() -> None:
    """The local time to the millisecond, the part of the program in a column of its own, and what it says."""
    with logged("text") as output:
        logging.getLogger().handle(record_at(CREATED))
    clock = time.strftime("%H:%M:%S", time.localtime(CREATED))

    assert f"{clock}.250 api        Reading ride 96 from server 'replica0'\n" == output.getvalue()


@pytest.mark.parametrize(
    ("level", "mark"),
    [(logging.INFO, ""), (logging.WARNING, "WARNING: "), (logging.ERROR, "ERROR: ")],
)
def test_only_what_needs_a_reader_is_marked(level: int, mark: str) -> None:
    """A warning or an error says so before its message; the usual has no mark."""
    with logged("text") as output:
        logging.getLogger("rocket.run").log(level, "so it is")

    assert output.getvalue().endswith(f" run        {mark}so it is\n")


def test_braces_and_percent_signs_in_a_message_are_left_alone() -> None:
    """What a client sent is never taken for a format."""
    with logged("text") as output:
        logging.getLogger("rocket.api").info("%s", "{message} {0} %s %(name)s")

    assert output.getvalue().endswith(" {message} {0} %s %(name)s\n")


def test_an_exception_is_shown_below_its_line() -> None:
    """People get the traceback as they know it."""
    with logged("text") as output:
        try_and_log()
    first, *below = output.getvalue().splitlines()

    assert first.endswith(" ERROR: it went wrong")
    assert below[0] == "Traceback (most recent call last):"
    assert below[-2:] == ["ValueError: in two", "lines"]


# --- for programs ---


def test_a_line_for_programs_is_one_object() -> None:
    """The time in UTC, level, part and message."""
    with logged("json") as output:
        logging.getLogger().handle(record_at(CREATED, level=logging.WARNING))

    assert entries(output) == [
        {
            "time": "2023-11-14T22:13:20.250Z",
            "level": "warning",
            "part": "api",
            "message": "Reading ride 96 from server 'replica0'",
        }
    ]


@pytest.mark.parametrize(("fraction", "shown"), [(0.0, "000"), (0.005, "005"), (0.999, "999")])
def test_milliseconds_have_three_digits(fraction: float, shown: str) -> None:
    """Times sort as text."""
    with logged("json") as output:
        logging.getLogger().handle(record_at(1_700_000_000 + fraction + 0.0001))

    assert f"2023-11-14T22:13:20.{shown}Z" == entries(output)[0]["time"]


@given(messages=st.lists(st.text(), max_size=5))
@settings(max_examples=50)
def test_whatever_is_said_there_is_one_line_a_record(messages: list[str]) -> None:
    """Line ends, quotes and control characters begin no new line, and come back as they were."""
    with logged("json") as output:
        for message in messages:
            logging.getLogger("rocket.api").info("%s", message)

    assert messages == [entry["message"] for entry in entries(output)]


@pytest.mark.parametrize("message", ["two\nlines", "two\r\nlines", "\n", '"}\n{"level": "forged"}', "\0\x1b[2J"])
def test_a_message_of_several_lines_is_one_line_for_programs(message: str) -> None:
    """A client cannot forge a record by what it sends."""
    with logged("json") as output:
        logging.getLogger("rocket.api").info("%s", message)

    assert output.getvalue().count("\n") == 1
    assert [message] == [entry["message"] for entry in entries(output)]


def test_an_exception_is_part_of_its_line() -> None:
    """Programs get the whole traceback, line ends and all, in the object of its record."""
    with logged("json") as output:
        try_and_log()
    (entry,) = entries(output)

    assert entry["message"] == "it went wrong"
    assert entry["level"] == "error"
    assert entry["exception"].startswith("Traceback (most recent call last):\n")
    assert entry["exception"].endswith("ValueError: in two\nlines")


def test_a_record_without_an_exception_does_not_name_one() -> None:
    """The field is there only when it says something."""
    with logged("json") as output:
        logging.getLogger("rocket.api").error("plain")

    assert list(entries(output)[0]) == ["time", "level", "part", "message"]


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_what_a_worker_says_carries_its_number(level: int) -> None:
    """Several processes write into one log: people see it behind the part, programs in a field of its own."""
    with logged("text", worker=2) as output:
        logging.getLogger("rocket.api").log(level, "so it is")
    assert " api/2      " in output.getvalue()
    with logged("json", worker=2) as output:
        logging.getLogger("rocket.api").log(level, "so it is")
    assert [("api", 2)] == [(entry["part"], entry["worker"]) for entry in entries(output)]


# --- what is said at all ---


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_of_ourselves_all_but_debugging_is_shown_and_of_others_warnings(log_format: str) -> None:
    """The libraries below speak only when something is wrong."""
    with logged(log_format) as output:
        for name in ("rocket.run", "aiohttp.access"):
            logging.getLogger(name).debug("debug of %s", name)
            logging.getLogger(name).info("info of %s", name)
            logging.getLogger(name).warning("warning of %s", name)

    assert re.findall(r"\w+ of [\w.]+", output.getvalue()) == [
        "info of rocket.run",
        "warning of rocket.run",
        "warning of aiohttp.access",
    ]


@pytest.mark.parametrize(
    ("name", "part"),
    [("rocket.run", "run"), ("rocket", "rocket"), ("aiohttp.access", "aiohttp.access"), ("rocketry", "rocketry")],
)
def test_a_part_is_named_without_our_own_name(name: str, part: str) -> None:
    """Parts of rocket go by their last name, others by their full one."""
    with logged("json") as output:
        logging.getLogger(name).warning("here")

    assert [part] == [entry["part"] for entry in entries(output)]


def test_configuring_twice_does_not_say_everything_twice() -> None:
    """The last format is the one in force."""
    with logged("text") as output:
        logs.configure("json")
        logging.getLogger("rocket.run").info("once")

    assert [entry["message"] for entry in entries(output)] == ["once"]


def try_and_log() -> None:
    """Log an error that carries an exception."""
    try:
        fail()
    except ValueError:
        logging.getLogger("rocket.api").exception("it went wrong")


def fail() -> NoReturn:
    """Raise an error whose message has a line end."""
    raise ValueError("in two\nlines")


async def test_a_reader_who_does_not_read_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines wait for a reader, in order; the log says how many were dropped for lack of room."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", 0) as reader, os.fdopen(writing, "w", encoding="utf-8") as output:
        monkeypatch.setattr("sys.stdout", output)
        with logged_to(output, most_waiting=1000):
            for number in range(10_000):
                logging.getLogger("rocket.api").info("line %05d", number)
            await asyncio.sleep(0)
            found = b""
            async with asyncio.timeout(20):
                while b"dropped" not in found:
                    found += await asyncio.to_thread(reader.read, 1 << 16)
            lines = [line for line in found.decode().splitlines() if "line " in line]
            assert [f"line {number:05d}" for number in range(len(lines))] == [line[-10:] for line in lines]
            dropped = 10_000 - len(lines)
            assert f"{dropped} lines of this log were dropped" in found.decode()
            logging.getLogger("rocket.api").info("and on")
            assert b"and on" in await asyncio.to_thread(reader.read, 1 << 16)


async def test_a_line_that_is_longer_than_what_a_pipe_takes_holds_nothing_up_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is written in pieces; a line that cannot be formatted is no caller's error meanwhile."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", 0) as reader, os.fdopen(writing, "w", encoding="utf-8") as output:
        monkeypatch.setattr("sys.stdout", output)
        monkeypatch.setattr(logging, "raiseExceptions", False)
        with logged_to(output):
            log = logging.getLogger("rocket.api")
            os.write(writing, b"x" * (2**16 - 4096))  # a page is free
            log.info("a long line: %s and its end", "y" * 20_000)
            log.info("%d", "no number")
            log.info("the next line")
            found = b""
            async with asyncio.timeout(20):
                while b"the next line" not in found:
                    found += await asyncio.to_thread(reader.read, 1 << 16)
            assert f"a long line: {'y' * 20_000} and its end\n" in found.decode()


def test_a_program_without_a_standard_output_has_a_log_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is started by `>&-`."""
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    with logged_to(None):
        logging.getLogger("rocket.api").info("to the standard error, if anywhere")


# --- lines that are alike ---


def test_lines_that_are_alike_are_counted_and_one_every_while_is_shown() -> None:
    """During an outage there would be one for every request."""
    with logged("text") as output:
        log = logging.getLogger("rocket.api")
        for at, alike in ((0, "a"), (1, "a"), (2, "b"), (4, "a"), (5, "a"), (5.1, None), (5.2, None)):
            values = {"msg": f"at {at}: {alike}", "args": (), "created": CREATED + at}
            log.handle(logging.makeLogRecord(vars(record_at(0, level=logging.WARNING)) | values | (
                {} if alike is None else {"alike": alike}
            )))  # fmt: skip

    lines = [line.partition("WARNING: ")[2] for line in output.getvalue().splitlines()]
    after_a_while = "at 5: a (and 2 more since the last line of that kind)"
    assert ["at 0: a", "at 2: b", after_a_while, "at 5.1: None", "at 5.2: None"] == lines
