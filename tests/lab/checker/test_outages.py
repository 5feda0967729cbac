"""The checker on runs with several processes of the API."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rocket.lab.checker.check import check
from rocket.lab.checker.history import TAKEN_OVER, Fault, Op, Outcome
from rocket.lab.checker.outages import outages_of
from rocket.lab.checker.report import report
from rocket.lab.checker.verdict import Judgement, Rule
from tests.lab.checker.stories import RUN, failed, read, story, token, write

SEVERAL = replace(RUN, processes=3)
SENT = token("0/10")


def fault(name: str, at: float, until: float, **detail: float | None) -> Fault:
    """Return something done to a process, met by a read."""
    return Fault(name=name, at=at, until=until, detail=detail)


def unanswered(at: float, status: int | None = 503, **values: object) -> Op:
    """Return a read with its session's token that failed."""
    return failed(replace(read("s1", at, 1, None, **values), sent=SENT), Outcome.FAIL, status)


def rules_broken(*added: Op | Fault, processes: int = 3) -> dict[Rule, int]:
    """Return how often each rule is broken in a run with these beside its frame."""
    return dict(check(story(*added, run=replace(SEVERAL, processes=processes))).counts or {})


@pytest.mark.parametrize("status", [None, 503])
def test_a_read_with_a_token_is_answered(status: int | None) -> None:
    """With several processes, whatever becomes of one of them."""
    assert {Rule.READ_NOT_ANSWERED: 1} == rules_broken(unanswered(20, status))
    assert {} == rules_broken(unanswered(20, status), processes=1)


def test_a_read_that_no_node_can_answer_is_excused() -> None:
    """The primary is away, or was until a moment ago; of a fault of something else nobody has to notice."""
    assert {} == rules_broken(unanswered(20), fault("primary-killed", 18.5, 19))
    assert {Rule.READ_NOT_ANSWERED: 1} == rules_broken(unanswered(22), fault("primary-killed", 18.5, 19))
    assert {Rule.READ_NOT_ANSWERED: 1} == rules_broken(unanswered(20), fault("replica-killed", 19, 21))


def test_what_is_no_read_with_a_token_is_not_counted() -> None:
    """Without a token the primary has to be asked; a write may fail; who hangs up gets no answer."""
    without = replace(unanswered(20), sent=None)
    hung_up = replace(unanswered(21), outcome=Outcome.UNKNOWN, status=None)
    refused = failed(write("s1", 22, None, 9.9), Outcome.FAIL, 503)
    assert {} == rules_broken(without, hung_up, refused)


@pytest.mark.parametrize(
    ("name", "took_s", "broken"),
    [
        ("writer-killed", 0.4, False),
        ("writer-killed", 2.1, True),
        ("writer-killed", None, True),
        ("writer-frozen", 2.1, False),
        ("writer-frozen", 4.1, True),
    ],
)
def test_another_process_writes_the_table_in_time(name: str, took_s: float | None, *, broken: bool) -> None:
    """Two seconds after a death; a little longer where the primary has to find out."""
    hit = fault(name, 20, 25, **{TAKEN_OVER: took_s})
    met = replace(read("s1", 21, 1, None), done=21.1)
    assert ({Rule.NOT_TAKEN_OVER: 1} if broken else {}) == rules_broken(hit, met)


def test_figures_tell_what_was_noticed() -> None:
    """What was sent again, what failed with and without an excuse, and how long nobody wrote."""
    history = story(
        fault("primary-killed", 30, 31),
        fault("writer-killed", 40, 41, **{TAKEN_OVER: 0.5}),
        unanswered(20),
        unanswered(30.5),
        replace(read("s1", 41, 1, None), sent=SENT, again=True),
        run=SEVERAL,
    )
    outages = outages_of(history)
    assert outages is not None
    assert (1, 2, 1) == (outages.again, outages.not_answered, outages.excused)
    assert {"writer-killed": (0.5,)} == outages.taken_over_s
    verdict = check(history)
    assert Judgement.VIOLATED is verdict.judgement
    assert "writer-killed: new writer" in report(verdict)
    assert outages_of(story()) is None
