"""A history is read back as it was written, and what is not one is refused in plain words."""

from __future__ import annotations

import json
import multiprocessing
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rocket.lab.checker.history import (
    Entry,
    Fault,
    GarbledHistory,
    History,
    HistoryNotFound,
    HistoryWriter,
    line_of,
    parse_line,
    read_history,
)
from tests.support.histories import FRAME, RUN, history_of, page, promotion, read, write

if TYPE_CHECKING:
    from pathlib import Path


def entries(history: History) -> list[Entry]:
    """Return the lines of a history, the run first."""
    assert history.healed is not None
    assert history.end is not None
    return [history.run, history.end, *reversed(history.ops), history.healed, *history.faults]


def written(path: Path, history: History) -> Path:
    """Write a history, in an order of its own."""
    first, *others = entries(history)
    path.write_text("\n".join([line_of(first), *map(line_of, others)]) + "\n", encoding="utf-8")
    return path


def test_a_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    """In whatever order the lines came, ops and faults are in the order of time."""
    history = history_of(
        page("s1", 2.0, (7, 0.7), lost="gone", error="none"), promotion(1.0, 2.0), write("s1", 1.0, 7, 0.7)
    )

    assert history == read_history(written(tmp_path / "history", history))


def _write_lines(path: Path, session: str) -> None:
    with HistoryWriter(path) as writer:
        for number in range(300):
            writer.add(page(session, float(number), *[(one, one / 10) for one in range(200)]))


def test_several_processes_append_whole_lines(tmp_path: Path) -> None:
    """No line is cut by another, however long they are."""
    path = tmp_path / "history"
    path.write_text("what was there before")
    HistoryWriter.create(path, RUN).close()
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_write_lines, args=(path, f"s{number}")) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    history = read_history(path)

    assert [0, 0, 0] == [process.exitcode for process in processes]
    assert RUN == history.run
    assert 900 == len(history.ops)


def test_a_line_that_is_cut_off_is_said_to_be(tmp_path: Path) -> None:
    """By its number."""
    path = written(tmp_path / "history", history_of())
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(GarbledHistory, match=r"^line 12 is cut off, or garbled: not JSON: "):
        read_history(path)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "the first line does not say what run this is"),
        ([FRAME[0], RUN], "the first line does not say what run this is"),
        ([RUN, FRAME[0], RUN], "two lines of the kind 'run'"),
        ([RUN, history_of().end, history_of().end], "two lines of the kind 'end'"),
    ],
)
def test_a_history_has_one_run_and_that_first(tmp_path: Path, lines: list[Entry], said: str) -> None:
    """And one end."""
    path = tmp_path / "history"
    path.write_text("".join(line_of(entry) + "\n" for entry in lines), encoding="utf-8")

    with pytest.raises(GarbledHistory, match=said):
        read_history(path)


def test_a_file_that_is_not_there_or_no_file_is_not_found(tmp_path: Path) -> None:
    """The message names it."""
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(HistoryNotFound, match=str(path)):
            read_history(path)


def changed(entry: Entry, **values: object) -> str:
    """Return an entry's line with other values."""
    return json.dumps({**json.loads(line_of(entry)), **values})


OK_WRITE, OK_READ, OK_PAGE = write("s1", 1.0, 7, 0.7), read("s1", 1.0, 7, 0.7), page("s1", 1.0, (7, 0.7))
FAULT = Fault(name="crash", at=1.0, until=2.0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        (b"\xff", "not JSON"),
        ("[" * 100_000, "Expected `object`, got `array`"),
        ('{"kind": NaN}', "not JSON"),
        ("9" * 5000, "Number out of range"),
        ("[]", "Expected `object`, got `array`"),
        ('{"kind": "opera"}', "Invalid value 'opera' - at `.*kind`"),
        ('{"kind": []}', "Expected `str` - at `.*kind`"),
        ('{"kind": "healed"}', "missing required field `at`"),
        ('{"kind": "healed", "at": 1, "by": 2}', "unknown field `by`"),
        ('{"kind": "healed", "at": "1"}', r"- at `\$\.at"),
        ('{"kind": "healed", "at": true}', r"- at `\$\.at"),
        (f'{{"kind": "healed", "at": 1{"0" * 400}}}', r"- at `\$\.at"),
        (changed(OK_WRITE, request="steal"), r"- at `\$\.request"),
        (changed(OK_WRITE, request=["read"]), r"- at `\$\.request"),
        (changed(OK_WRITE, role="king"), r"- at `\$\.role"),
        (changed(OK_WRITE, session=1), r"- at `\$\.session"),
        (changed(OK_WRITE, session="\ud800"), "not JSON"),
        (changed(OK_WRITE, tokens=1), r"- at `\$\.tokens"),
        (changed(OK_WRITE, status=True), r"- at `\$\.status"),
        (changed(OK_PAGE, rides=7), r"- at `\$\.rides"),
        (changed(OK_PAGE, rides=[[7]]), r"- at `\$\.rides"),
        (changed(OK_PAGE, rides=[[7, 0.7, 1]]), r"- at `\$\.rides"),
        (changed(OK_PAGE, rides=[[7.0, 0.7]]), r"- at `\$\.rides"),
        (changed(OK_PAGE, rides=[[True, 0.7]]), r"- at `\$\.rides"),
        (changed(OK_PAGE, rides=[[{}, 0.7]]), r"- at `\$\.rides"),
        (changed(FAULT, detail=[]), r"- at `\$\.detail"),
        (changed(FAULT, until=0.5), "over before it began"),
        (changed(RUN, version=3), "version 3"),
        (changed(RUN, nodes="primary"), r"- at `\$\.nodes"),
        (changed(OK_PAGE, done=0.5), "done before it began"),
        (changed(OK_WRITE, distance=None), "without its distance"),
        (changed(OK_WRITE, ride=None), "without its id"),
        (changed(OK_WRITE, status=200), "'ok' with status 200"),
        (changed(OK_WRITE, status=None), "'ok' with status None"),
        (changed(OK_READ, ride=None), "without its id"),
        (changed(OK_READ, distance=None), "has a distance"),
        (changed(OK_READ, status=404), "not found has none"),
        (changed(OK_READ, status=404, distance=None, outcome="fail"), "is an answer"),
        (changed(OK_PAGE, rides=None), "without its rides"),
        (changed(OK_PAGE, complete=None), "whether it is complete"),
        (changed(OK_PAGE, freshness="mixed"), "no read asks for 'mixed'"),
        (changed(RUN, freshness="within 0s"), "no reads ask for 'within 0s'"),
    ],
)
def test_a_garbled_line_is_refused(line: str | bytes, said: str) -> None:
    """The message says what is wrong with it."""
    with pytest.raises(GarbledHistory, match=said):
        parse_line(line)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["kind", "at", "leaked"]) | st.text(), inner)
        ),
    )
    | st.dictionaries(st.just("kind"), st.sampled_from(["run", "op", "fault", "healed", "end"]))
)
def test_no_line_makes_the_reader_stumble(value: Any) -> None:
    """It is an entry, or it is garbled."""
    try:
        parse_line(json.dumps(value))
    except GarbledHistory as error:
        assert str(error)  # noqa: PT017 - or it was an entry


def test_distances_have_one_decimal() -> None:
    """As the API shows them."""
    entry = parse_line(changed(OK_PAGE, rides=[[7, 0.7000000001], [8, 1]]))

    assert page("s1", 1.0, (7, 0.7), (8, 1.0)) == entry


def test_a_history_from_before_the_sessions_of_the_library_is_read() -> None:
    """Its lines lack the fields that came with them."""
    line = line_of(read("s1", 1.0, 7, 0.7))
    for field in ('"work":null,', '"raised":null,', ',"work":null', ',"raised":null'):
        line = line.replace(field, "")

    assert "raised" not in line
    assert parse_line(line) == read("s1", 1.0, 7, 0.7)
    earlier = line_of(RUN).replace(',"library":false', "").replace('"library":false,', "")
    assert "library" not in earlier
    assert parse_line(earlier) == RUN
