"""A run is void unless it tried enough; and the figures count what it tried."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from rocket.lab.checker.check import Judgement, check
from rocket.lab.checker.coverage import figures_of
from rocket.lab.checker.history import Fault, Op, Outcome, Request, Role
from tests.support.histories import (
    FRAME,
    LOST,
    RUN,
    held,
    history_of,
    on_primary,
    op,
    page,
    promotion,
    read,
    void,
    write,
)


def without(*times: float) -> tuple[Op, ...]:
    """Return the frame without what happens at these times."""
    return tuple(one for one in FRAME if one.at not in times)


def test_a_replica_that_never_served_makes_a_run_void() -> None:
    """Of all nodes one is the primary, known by its name or by its number."""
    nodes = ("first", "replica0", "replica1")
    more = replace(RUN, nodes=("primary", "replica0", "replica1", "replica2"))
    unnamed = replace(RUN, nodes=("first", "second", "replica0", "replica1"))

    verdict = check(history_of(run=more))

    assert ("replica2 never served a read as a replica",) == verdict.reasons
    assert ("second never served a read as a replica",) == check(history_of(run=unnamed)).reasons
    held(history_of(run=replace(RUN, nodes=nodes)))
    held(history_of(run=replace(more, routing="primary")))


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ((0.4,), "fell back"),
        ((0.2,), "waited"),
    ],
)
def test_a_run_without_fallbacks_or_waits_is_void(missing: tuple[float, ...], reason: str) -> None:
    """But only with the routing that has them."""
    other = page("s8", 0.2)
    history = history_of(other, frame=without(*missing))

    void(history, reason)
    held(replace(history, run=replace(RUN, routing="random")))


@pytest.mark.parametrize("freshness", ["global", "within 10s", "any"])
def test_a_run_whose_reads_were_never_served_as_they_asked_is_void(freshness: str) -> None:
    """By a replica: the primary shows everything."""
    run = replace(RUN, freshness=freshness)
    asked = replace(page("s8", 0.5), freshness=freshness)

    void(history_of(on_primary(asked), run=run), f"no read that asked for '{freshness}' was answered by a replica")
    held(history_of(asked, run=run))


def test_a_run_of_reads_that_need_not_wait_does_without_waits() -> None:
    """And without fallbacks, unless some of its reads ask for more."""
    asked = replace(page("s8", 0.5), freshness="any")
    shown = [page("s8", 0.2), page("s8", 0.4)]
    history = history_of(*shown, asked, frame=without(0.2, 0.4), run=replace(RUN, freshness="any"))

    held(history)
    mixed = [replace(page("s8", 0.5 + more / 10), freshness=each)
             for more, each in enumerate(("global", "within 2s", "any"))]  # fmt: skip
    history = history_of(*shown, *mixed, frame=without(0.2, 0.4), run=replace(RUN, freshness="mixed"))
    assert 2 == len(check(history).reasons)
    held(history_of(*mixed, run=replace(RUN, freshness="mixed")))


def test_a_read_that_was_meant_for_the_primary_is_no_fallback() -> None:
    """The reason tells."""
    history = history_of(on_primary(page("s8", 0.4), "asked"), frame=without(0.4))

    void(history, "fell back")


def test_a_fault_that_never_happened_makes_a_run_void() -> None:
    """It was asked for."""
    void(history_of(run=replace(RUN, faults=("replay-paused", "crash"))), "'crash' was meant to happen")


def test_a_fault_that_met_no_request_makes_a_run_void() -> None:
    """Whichever of several of its kind it was."""
    history = history_of()
    fault = Fault(name="crash", at=50.0, until=51.0)
    request = op("s1", Request.LIST, 50.5, rides=(), complete=True)

    void(replace(history, faults=(*history.faults, fault)), "1 of 1 times no request met the fault 'crash'")
    held(history_of(fault, replace(request, session="s1")))


def test_a_run_without_an_end_is_void_and_one_without_healing_too() -> None:
    """It was cut off."""
    void(replace(history_of(), end=None), "no end")
    void(replace(history_of(), healed=None), "faults were over")


def test_a_run_without_writes_is_void() -> None:
    """Nothing can be stale."""
    frame = tuple(
        replace(one, distance=None, status=404) if one.request is Request.READ else one for one in without(0.1)
    )

    void(history_of(frame=frame), "no write was acknowledged")


def test_a_run_without_reads_is_void() -> None:
    """For all the reasons that there are."""
    verdict = check(history_of(frame=without(*(one.at for one in FRAME if one.request is Request.READ))))

    assert Judgement.VOID is verdict.judgement
    assert "no read was answered" in verdict.reasons


def test_the_figures_count_what_happened() -> None:
    """As the table shows it."""
    written = write("s1", 1.0, 7, 0.7)
    lost = read("s1", 4.0, 7, None, lost=LOST)

    figures = check(history_of(written, promotion(2.0, 3.0), lost, read("bare1", 5.0, 7, None))).figures

    assert figures is not None
    assert (1, 1) == (figures.lost_and_reported, figures.lost_without_token)
    assert {"not-caught-up": 1} == figures.fallbacks
    assert 1 == figures.waits
    assert 2 == figures.requests[Request.WRITE, Outcome.OK]
    assert 1 == figures.reads["primary", Role.PRIMARY]
    assert 2 == figures.reads["replica1", Role.REPLICA]
    assert (1, 1) == (figures.faults["promotion-lossy"].times, figures.faults["promotion-lossy"].ops_overlapped)
    assert 95.99 == pytest.approx(figures.longest_without_read_s, abs=0.02)
    assert 10 == pytest.approx(figures.read_p50_ms)


def test_sessions_of_the_library_have_to_show_something_by_errors() -> None:
    """Otherwise nothing is known of what errors show; how often they did is counted by the kind of work."""
    run = replace(RUN, library=True)
    shown = read("frame9", 5.0, 900_001, 99_000.1, work="raises", raised="error")

    tenants = read("frame9", 6.0, 900_001, 99_000.1, work="tenant")

    void(history_of(tenants, run=run), "no error of work showed anything")
    void(history_of(shown, run=run), "no work was a tenant's")
    held(history_of(shown, tenants, run=run))
    figures = figures_of(history_of(shown))
    assert ({("raises", Outcome.OK): 1}, {"error": 1}) == (figures.library, figures.raised)


def test_a_read_inside_a_write_is_no_fallback() -> None:
    """It asked for the primary."""
    inside = on_primary(page("frame9", 5.0, (900_001, 99_000.1), work="raises"), "write")

    assert figures_of(history_of()).fallbacks == figures_of(history_of(inside)).fallbacks
