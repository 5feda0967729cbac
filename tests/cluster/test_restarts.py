"""When a server that died is started again, in virtual time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rocket.cluster.supervisor import RestartPolicy

GAPS_S = st.floats(0, 100)


def test_the_first_death_costs_only_a_short_pause() -> None:
    """A server that crashed once is back at once."""
    assert RestartPolicy().after_death(1000.0, asked=False) == 0.1


def test_the_pause_grows_from_death_to_death() -> None:
    """A server that dies again soon is left alone for twice as long."""
    policy = RestartPolicy()
    pauses = []
    for now in (0.0, 10.0, 20.0, 30.0):
        pauses.append(policy.after_death(now, asked=False))
        policy.started()

    assert pauses == [0.1, 0.2, 0.4, 0.8]


def test_after_a_quiet_minute_the_pause_is_short_again() -> None:
    """Deaths of more than a minute ago are forgiven."""
    policy = RestartPolicy()
    for now in (0.0, 10.0, 20.0):
        policy.after_death(now, asked=False)
        policy.started()

    assert policy.after_death(80.5, asked=False) == 0.1


@pytest.mark.parametrize(("fifth_death_at", "gives_up"), [(4.0, True), (60.0, True), (60.5, False)])
def test_five_deaths_within_a_minute_are_enough(fifth_death_at: float, gives_up: bool) -> None:
    """A server that starts well and dies again and again is given up, but not one that dies less often."""
    policy = RestartPolicy()
    for now in (0.0, 1.0, 2.0, 3.0):
        assert policy.after_death(now, asked=False) is not None
        policy.started()

    assert gives_up == (policy.after_death(fifth_death_at, asked=False) is None)


@pytest.mark.parametrize("asked", [True, False])
def test_five_failed_starts_in_a_row_are_enough_however_slow(*, asked: bool) -> None:
    """A server that died and then fails to start five times is given up, even if each attempt takes long."""
    policy = RestartPolicy()
    assert policy.after_death(0.0, asked=asked) == 0.1
    answers = [policy.after_failed_start(asked=False) for _ in range(5)]

    assert answers == [0.2, 0.4, 0.8, 1.6, None]


def test_a_start_that_went_well_ends_the_row() -> None:
    """Failed starts count only in a row."""
    policy = RestartPolicy()
    for _ in range(4):
        policy.after_failed_start(asked=False)
    policy.started()

    assert policy.after_failed_start(asked=False) == 0.2


def test_two_failed_starts_in_a_row_make_it_dubious() -> None:
    """Until one goes well."""
    policy = RestartPolicy()
    policy.after_death(0.0, asked=False)
    said = [policy.dubious]
    for asked in (False, True, False):
        policy.after_failed_start(asked=asked)
        said.append(policy.dubious)
    policy.started()

    assert [False, False, False, True, False] == [*said, policy.dubious]


@pytest.mark.parametrize(("gap_s", "dubious"), [(10.0, [False, False, True, True]), (31.0, [False] * 4)])
def test_three_deaths_within_a_minute_make_it_dubious(gap_s: float, dubious: list[bool]) -> None:
    """Not deaths on demand, after which its directory is as good as before."""
    policy = RestartPolicy()
    said = []
    for number in range(4):
        policy.after_death(number * gap_s, asked=False)
        said.append(policy.dubious)
        policy.started()
    policy.after_death(4 * gap_s, asked=True)

    assert [*dubious, False] == [*said, policy.dubious]


def test_deaths_that_were_asked_for_never_count() -> None:
    """However often a server is killed on demand, it comes back at once."""
    policy = RestartPolicy()
    answers = [policy.after_death(number / 10, asked=True) for number in range(50)]
    answers += [policy.after_failed_start(asked=True) for _ in range(50)]

    assert answers == [0.1] * 100


def test_one_server_gives_up_for_itself_only() -> None:
    """Each server has its own count."""
    dying, healthy = RestartPolicy(), RestartPolicy()
    for now in range(5):
        dying.after_death(float(now), asked=False)

    assert healthy.after_death(5.0, asked=False) == 0.1


@given(deaths=st.lists(st.tuples(GAPS_S, st.booleans(), st.booleans()), max_size=15))
@settings(max_examples=100)
def test_deaths_that_were_asked_for_change_nothing_for_the_others(deaths: list[tuple[float, bool, bool]]) -> None:
    """With those left out, every other death gets the same answer."""
    with_asked, without = RestartPolicy(), RestartPolicy()
    now = 0.0
    for gap_s, asked, started in deaths:
        now += gap_s
        answer = with_asked.after_death(now, asked=asked)
        if asked:
            assert answer == 0.1
            continue
        assert without.after_death(now, asked=False) == answer
        if started:
            with_asked.started()
            without.started()


@given(runs=st.lists(st.tuples(GAPS_S, st.integers(0, 6)), max_size=15))
@settings(max_examples=100)
def test_giving_up_is_what_its_two_rules_say(runs: list[tuple[float, int]]) -> None:
    """Given up exactly after five failed starts in a row or five deaths within a minute."""
    policy = RestartPolicy()
    moments = list(itertools.accumulate(gap_s for gap_s, _ in runs))
    for number, (now, (_, failing)) in enumerate(zip(moments, runs, strict=True), start=1):
        within_a_minute = sum(1 for moment in moments[:number] if now - moment <= 60)
        pause_s = policy.after_death(now, asked=False)

        assert (within_a_minute >= 5) == (pause_s is None)
        if pause_s is None:
            return
        for failed in range(1, failing + 1):
            pause_s = policy.after_failed_start(asked=False)

            assert (failed >= 5) == (pause_s is None)
            if pause_s is None:
                return
        policy.started()
