"""A verdict as text and as JSON, and the exit code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from rocket.lab.checker.check import check
from rocket.lab.checker.history import Fault, History, Outcome, line_of
from rocket.lab.checker.report import excerpt, report
from rocket.lab.cli import main
from tests.support.histories import failed, history_of, page, token, write

if TYPE_CHECKING:
    from pathlib import Path

WRITTEN = write("s1", 1.0, 7, 0.7, sent=token("0/10"), got=token("0/20"))
STALE = page("s1", 2.0, sent=token("0/20"))


def saved(path: Path, history: History) -> str:
    """Write a history to a file and return its name."""
    entries = [history.run, *history.ops, *history.faults, history.healed, history.end]
    path.write_text("".join(line_of(entry) + "\n" for entry in entries if entry), encoding="utf-8")
    return str(path)


def test_an_excerpt_can_be_followed() -> None:
    """It shows when, which session, what, where, why and with which tokens; and the faults meanwhile."""
    crash = Fault(name="crash", at=1.5, until=3.0, node="replica1")

    (violation,) = check(history_of(WRITTEN, STALE, crash)).violations

    assert [
        "      1.0000 -     1.0100 s  s1  POST /rides distance=0.7  ->  ok 201, ride 7",
        "      user1@example.com, with tokens; by primary (write)",
        "      sent 1~1-aaaaaaaa~0/10~0/0, got 1~1-aaaaaaaa~0/20~0/0",
        "      1.5000 -     3.0000 s  fault: crash on replica1",
        "      2.0000 -     2.0100 s  s1  GET /rides  ->  ok 200, all rides: none; without 0.7",
        "      user1@example.com, with tokens; by replica0 as replica (caught-up)",
        "      sent 1~1-aaaaaaaa~0/20~0/0, got none",
    ] == excerpt(violation)


def test_a_page_in_an_excerpt_says_whether_the_ride_is_on_it() -> None:
    """Also where it is too long to be shown as a whole."""
    writes = [write("other1", number / 10, number, float(number)) for number in range(1, 21)]
    rides = [(number, float(number)) for number in range(20, 0, -1)]
    seen, gone = page("s1", 3.0, *rides), page("s1", 4.0, *rides[:-1])

    (violation,) = check(history_of(*writes, seen, gone)).violations
    text = "\n".join(excerpt(violation))

    assert "all rides: 20 (20.0), 19 (19.0)" in text
    assert "and 12 more; with 1.0\n" in text
    assert "and 11 more; without 1.0\n" in text


def test_the_report_ends_with_the_verdict() -> None:
    """After the table and, where something is wrong, after what is wrong."""
    held = report(check(history_of())).splitlines()
    violated = report(check(history_of(WRITTEN, STALE))).splitlines()
    void = report(check(replace(history_of(), end=None))).splitlines()

    assert held[-1].startswith("HELD")
    assert violated[-1].startswith("VIOLATED")
    assert "Rules broken: read-your-writes 1 times." in violated
    assert any(line.startswith("Violation 1 (read-your-writes): The write of ride 7 ") for line in violated)
    assert void[-1].startswith("VOID")
    assert "  - the history has no end: the run was cut off" in void


def test_the_table_shows_what_happened() -> None:
    """A row each; a first cell is not repeated."""
    text = report(
        check(history_of(WRITTEN, failed(write("s1", 3.0, None, 0.8), Outcome.UNKNOWN, 504)))
    ).splitlines()
    rows = [" ".join(line.split()) for line in text]

    assert "fallbacks to the primary not-caught-up 1" in rows
    assert "reads that waited and were served by a replica 1" in rows
    assert "writes ok 2" in rows
    assert "unknown 1" in rows
    assert "faults replay-paused 1 (met by 1 requests)" in rows
    assert "replica0 as replica 3 (50.0 %)" in rows


def test_what_servers_said_does_not_steer_the_terminal() -> None:
    """Nor begins a line of its own."""
    stale = replace(STALE, error="\x1b[2J\nHELD")

    text = report(check(history_of(WRITTEN, stale)))

    assert "\x1b" not in text
    assert "HELD" not in text.splitlines()


@pytest.mark.parametrize(
    ("history", "code", "verdict"),
    [
        (history_of(), 0, "held"),
        (history_of(WRITTEN, STALE), 2, "violated"),
        (replace(history_of(), end=None), 3, "void"),
    ],
)
def test_the_exit_code_is_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], history: History, code: int, verdict: str
) -> None:
    """In text and in JSON."""
    file = saved(tmp_path / "history", history)

    assert code == main(["check", file])
    assert verdict.upper() in capsys.readouterr().out.splitlines()[-1]
    assert code == main(["check", file, "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (verdict, code) == (said["verdict"], said["exit_code"])
    assert bool(said["violations"]) is (code == 2)
    assert said["figures"]["waits"] == 1


def test_a_garbled_history_is_void(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says which line; in JSON too."""
    file = tmp_path / "history"
    saved(file, history_of())
    file.write_bytes(file.read_bytes()[:-9])

    assert 3 == main(["check", str(file)])
    assert "line 12 is cut off" in capsys.readouterr().out
    assert 3 == main(["check", str(file), "--json"])
    assert json.loads(capsys.readouterr().out)["figures"] is None


def test_a_history_that_is_not_there_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a verdict."""
    assert 64 == main(["check", str(tmp_path / "none")])
    assert "cannot read the history" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["check"], 64),
        (["check", "file", "--bogus"], 64),
        (["check", "file", "another"], 64),
        (["--bogus", "check", "file"], 64),
        (["check", "--help"], 0),
        (["run-all", "--bogus"], 2),
        (["run-all", "check"], 2),
        ([], 2),
    ],
)
def test_wrong_use_is_not_taken_for_a_verdict(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int
) -> None:
    """The other commands keep their exit code."""
    with pytest.raises(SystemExit) as end:
        main(arguments)

    assert code == end.value.code
    capsys.readouterr()
