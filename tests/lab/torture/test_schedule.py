"""Plans of faults: repeatable, complete, and over in the end."""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rocket.lab.torture.faults import FAULTS
from rocket.lab.torture.schedule import PlannedFault, plan, shortest_duration_s
from rocket.lab.torture.settings import TortureSettings, add_arguments

if TYPE_CHECKING:
    from pathlib import Path

SEEDS = st.integers(min_value=0, max_value=2**64)
NAMES = st.sets(st.sampled_from(sorted(FAULTS)), min_size=1)


def faulty_replicas(faults: tuple[PlannedFault, ...], at: float) -> int:
    """Count the faults of single replicas that are on at a moment."""
    return sum(fault.lane.startswith("replica") and fault.at <= at < fault.until for fault in faults)


@given(SEEDS, NAMES, st.floats(min_value=0, max_value=600), st.integers(min_value=2, max_value=9))
def test_every_fault_happens_and_ends_in_time(seed: int, names: set[str], more_s: float, replicas: int) -> None:
    """However short the run, as long as it is not refused."""
    if replicas == 2:
        more_s += shortest_duration_s(names)  # one at a time takes twice as long
    duration_s = shortest_duration_s(names) + more_s

    faults = plan(seed, duration_s, names, replicas)

    assert names == {fault.name for fault in faults}
    assert all(0 <= fault.at < fault.until <= duration_s for fault in faults)
    assert all(fault.length_s <= FAULTS[fault.name].longest_s + 0.001 for fault in faults)


@given(SEEDS, NAMES, st.floats(min_value=20, max_value=120))
def test_a_plan_is_made_of_its_seed_alone(seed: int, names: set[str], duration_s: float) -> None:
    """The order in which faults are named does not matter either."""
    assert plan(seed, duration_s, sorted(names), 5) == plan(seed, duration_s, sorted(names, reverse=True), 5)


@given(SEEDS, st.integers(min_value=2, max_value=9))
def test_faults_leave_nodes_to_serve(seed: int, replicas: int) -> None:
    """Within a lane one follows another, never are all replicas faulty by themselves, and calm comes again."""
    faults = plan(seed, 60, FAULTS, replicas)

    for lane in {fault.lane for fault in faults}:
        in_lane = [fault for fault in faults if fault.lane == lane]
        assert all(earlier.until <= later.at for earlier, later in pairwise(in_lane))
    assert all(faulty_replicas(faults, fault.at) < replicas for fault in faults)
    for number in range(1, 7):
        assert not any(fault.at <= number * 10 - 0.5 < fault.until for fault in faults)


def test_faults_overlap() -> None:
    """A replica is faulty while the primary is, at times."""
    faults = plan(1, 60, FAULTS, 5)

    assert any(faulty_replicas(faults, fault.at) for fault in faults if fault.lane == "primary")


@given(SEEDS)
def test_a_fault_that_takes_more_time_gets_it(seed: int) -> None:
    """A synchronous standby is away for longer than a COMMIT of the library's sessions may take."""
    names = ["standby-away", "primary-killed", "promotion", "recovery-conflict"]
    faults = plan(seed, 60, names, 5)

    assert all(fault.length_s > 2.5 for fault in faults if fault.name == "standby-away")


def test_faults_that_cost_all_replicas_happen_by_name_alone(tmp_path: Path) -> None:
    """`all` leaves them out."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    destructive = {name for name, kind in FAULTS.items() if kind.by_name}

    def chosen(*flags: str) -> set[str]:
        given = parser.parse_args([*flags, "--history", str(tmp_path / "history")])
        return set(TortureSettings.read(given).faults)

    assert {"restored-snapshot", "signal-removed"} == destructive
    assert not destructive & chosen()
    assert destructive == chosen("--faults", ",".join(destructive))


def test_no_faults_are_an_empty_plan() -> None:
    """Traffic alone is a run as well."""
    assert () == plan(1, 60, [], 5)


@pytest.mark.parametrize(
    ("duration_s", "names", "replicas", "words"),
    [
        (60, ["sunshine"], 5, "there is no fault sunshine"),
        (2, FAULTS, 5, "need .* s at the least"),
        (60, ["link-cut"], 1, "two replicas"),
    ],
)
def test_what_cannot_be_planned_is_refused(duration_s: float, names: list[str], replicas: int, words: str) -> None:
    """With words that say what would do."""
    with pytest.raises(ValueError, match=words):
        plan(1, duration_s, names, replicas)
