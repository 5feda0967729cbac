"""Zones, weights and speed: which of the fit replicas serves, and that it is never any other."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rocket.consistency import Board, Choice, Preferences, Reason, choose
from tests.consistency.test_choice import (
    NAMES,
    NOW,
    QUESTIONS,
    SMALL,
    UNBOUNDED,
    board_of,
    read_on,
    replica,
    wrote,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from rocket.consistency import Leaning
    from tests.consistency.test_choice import Question

OTHER_ZONE = 16
"""How much busier a zone may be than another one before reads leave it."""
SPREAD = list(map(random.Random(1).getrandbits, [30] * 3000))
"""Starts as the router draws them."""


def measured(preferences: Preferences, name: str, *took_s: float, at: float = NOW - 1.0) -> None:
    """Have a replica answer so often, twice a second, in these times."""
    for number, each_s in enumerate(took_s or (0.0, 0.0)):
        asked_at = at + number / 2 - each_s
        preferences.note(replace(replica(name, observed_at=asked_at), answered_at=asked_at + each_s))


def preferring(
    zones: Mapping[str, str] | None = None,
    weights: Mapping[str, float] | None = None,
    took_s: Mapping[str, float] | None = None,
    names: Sequence[str] = NAMES,
) -> Preferences:
    """Return the preferences of a router for the nodes of the tests, all alike unless something else is said."""
    preferences = Preferences()
    for name in names:
        preferences.add(name, (zones or {}).get(name), (weights or {}).get(name, 1.0))
        each_s = (took_s or {}).get(name, 0.0)
        measured(preferences, name, each_s, each_s)
    return preferences


def shares(
    preferences: Preferences, board: Board, zone: str | None = None, load: Mapping[str, int] | None = None
) -> Counter[str]:
    """Return how many of many reads each replica serves."""
    served: Counter[str] = Counter()
    for start in SPREAD:
        choice = choose(
            wrote(1),
            board,
            UNBOUNDED,
            now=NOW,
            start=start,
            load=lambda name: (load or {}).get(name, 0),
            leaning=preferences.leaning(zone),
        )
        assert choice.status is not None
        served[choice.status.name] += 1
    return served


FIVE = board_of(*map(replica, NAMES))


# --- what holds for all that may be preferred ---


class Setting(NamedTuple):
    """All that may be preferred or avoided."""

    zones: dict[str, str]
    zone: str | None
    weights: dict[str, float]
    took_s: dict[str, float]
    load: dict[str, int]
    unreachable: frozenset[str]

    def leaning(self) -> Leaning | None:
        """Return what a router prefers then."""
        return preferring(self.zones, self.weights, self.took_s).leaning(self.zone)


def of_each(*values: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Draw one of these values for each replica."""
    return st.fixed_dictionaries(dict.fromkeys(NAMES, st.sampled_from(values)))


SETTINGS = st.builds(
    Setting,
    zones=of_each("a", "b", None),
    zone=st.sampled_from(["a", "b", "c", None]),
    weights=of_each(0.0, 0.01, 1.0, 1.0, 3.0, 1000.0),
    took_s=of_each(0.0, 0.001, 0.02, 0.3, 5.0),
    load=of_each(0, 1, 5, 17, 300),
    unreachable=st.just(frozenset[str]()) | st.frozensets(st.sampled_from(NAMES), max_size=2),
)


@given(question=QUESTIONS, setting=SETTINGS, node=st.none() | st.sampled_from(NAMES), read_floor=SMALL)
@settings(max_examples=400)
def test_whatever_is_preferred_a_fit_replica_is_chosen_if_there_is_any_and_no_other(
    question: Question, setting: Setting, node: str | None, read_floor: int
) -> None:
    """Preferences choose among those that are fit, and may be read from: they never send a read to the primary."""
    token = read_on(node, min(question.floor, 12), read_floor)
    resting = frozenset(name for name in NAMES if setting.weights[name] == 0)

    def chosen(unreachable: Collection[str], leaning: Leaning | None) -> Choice:
        return choose(
            token,
            question.board,
            question.policy,
            now=NOW,
            start=question.start,
            load=setting.load.__getitem__,
            without=question.without,
            unreachable=unreachable,
            leaning=leaning,
        )

    choice = chosen(setting.unreachable, setting.leaning())
    allowed = chosen(setting.unreachable | resting, None)

    assert (choice.status is None) == (allowed.status is None)
    if choice.status is not None:
        assert choice.status.name not in question.without | setting.unreachable | resting
        assert choice == chosen({*NAMES} - {choice.status.name}, None)
    elif not resting:
        assert allowed.reason == choice.reason


@given(took_s=of_each(0.0, 0.0001, 0.0009))
@settings(max_examples=50)
def test_where_all_are_alike_nothing_is_preferred(took_s: dict[str, float]) -> None:
    """Then a decision costs what it costs without zones, weights and speed."""
    zones = dict.fromkeys(NAMES, "a")

    assert preferring(zones, dict.fromkeys(NAMES, 7.0), took_s).leaning("a") is None
    assert preferring(zones, took_s=took_s).leaning("b") is None
    assert preferring({"replica0": "a"}, took_s=took_s).leaning(None) is None


# --- weights ---


@pytest.mark.parametrize(
    "weights", [(1.0, 3.0, 1.0, 1.0, 1.0), (0.5, 1.5, 1.0, 2.0, 5.0), (1.0, 100.0, 100.0, 100.0, 100.0)]
)
def test_idle_replicas_are_read_from_by_their_weights(weights: tuple[float, ...]) -> None:
    """As many reads for each as its weight is of all weights."""
    served = shares(preferring(weights=dict(zip(NAMES, weights, strict=True))), FIVE)

    for name, weight in zip(NAMES, weights, strict=True):
        assert weight / sum(weights) == pytest.approx(served[name] / len(SPREAD), abs=0.02)


def test_how_busy_a_replica_is_counts_by_its_weight() -> None:
    """Three reads at work where the weight is 3 are fewer than two where it is 1."""
    board = board_of(replica("replica0"), replica("replica1"))
    preferences = preferring(weights={"replica1": 3.0}, names=NAMES[:2])

    assert {"replica1"} == set(shares(preferences, board, load={"replica0": 2, "replica1": 3}))
    assert {"replica0"} == set(shares(preferences, board, load={"replica0": 1, "replica1": 6}))


def test_a_replica_without_weight_serves_not_even_its_own_session() -> None:
    """Nor if no other is left; and it is not said to be out of reach."""
    preferences = preferring(weights={"replica0": 0.0})
    for others in [("replica1",), ()]:
        board = board_of(*map(replica, ("replica0", *others)))
        choice = choose(read_on("replica0", 50, 100), board, UNBOUNDED, now=NOW, leaning=preferences.leaning(None))

        served = Choice(replica("replica1"), Reason.CAUGHT_UP)
        assert (served if others else Choice(None, Reason.NO_STATUS)) == choice


# --- zones ---

ZONES = {"replica0": "a", "replica1": "b", "replica2": "b", "replica3": "a", "replica4": "b"}


def test_reads_stay_in_the_own_zone() -> None:
    """Spread evenly, also where they are somewhat busier than others."""
    for busy in (0, 3, OTHER_ZONE):
        served = shares(preferring(ZONES), FIVE, "a", dict.fromkeys(("replica0", "replica3"), busy))

        assert {"replica0", "replica3"} == set(served)
        assert len(SPREAD) / 2 == pytest.approx(served["replica0"], rel=0.05) or busy


def test_reads_leave_the_own_zone_when_it_is_much_busier() -> None:
    """For those of other zones, evenly; and for none that is as busy."""
    loads = dict.fromkeys(("replica0", "replica3"), OTHER_ZONE + 1)

    assert {"replica1", "replica2", "replica4"} == set(shares(preferring(ZONES), FIVE, "a", loads))
    assert {"replica0", "replica3"} == set(shares(preferring(ZONES), FIVE, "a", dict.fromkeys(NAMES, 99)))


def test_another_zone_serves_if_none_of_the_own_is_fit() -> None:
    """Each of its replicas as often as the others."""
    board = board_of(*(replica(name, 0 if ZONES[name] == "a" else 100) for name in NAMES))
    served = shares(preferring(ZONES), board, "a")

    assert {"replica1", "replica2", "replica4"} == set(served)
    assert max(served.values()) < 1.2 * min(served.values())


def test_a_session_comes_back_to_the_own_zone() -> None:
    """Its own replica is not kept where it is of another zone, unless no other has what it must see."""
    leaning = preferring(ZONES).leaning("a")
    token = read_on("replica1", 50, 100)
    ahead = board_of(*(replica(name, 50 if ZONES[name] == "a" else 100) for name in NAMES))

    for start in SPREAD[:100]:
        choice = choose(token, FIVE, UNBOUNDED, now=NOW, start=start, leaning=leaning)
        assert choice.status is not None
        assert "a" == ZONES[choice.status.name]
        assert replica("replica1") == choose(token, ahead, UNBOUNDED, now=NOW, start=start, leaning=leaning).status


def test_the_zone_may_change_at_any_time() -> None:
    """What is preferred follows the policy of the read."""
    preferences = preferring(ZONES)

    assert {"replica0", "replica3"} == set(shares(preferences, FIVE, "a"))
    assert {"replica1", "replica2", "replica4"} == set(shares(preferences, FIVE, "b"))
    preferences.remove("replica1")
    assert {"replica2", "replica4"} == set(shares(preferences, FIVE, "b"))


# --- speed ---


def test_idle_reads_go_to_the_fast_ones_and_a_few_to_the_slow_one() -> None:
    """However slow that is: its connections stay open, and its faults show."""
    for took_s in (0.02, 5.0):
        served = shares(preferring(took_s=dict.fromkeys(NAMES[:3], took_s)), FIVE)

        for name in NAMES[:3]:
            assert 0.0005 < served[name] / len(SPREAD) < 0.02
        assert served["replica3"] == pytest.approx(served["replica4"], rel=0.15)


def test_a_replica_that_is_somewhat_slow_gets_few_reads_as_well() -> None:
    """Of those that start there it is given one of four."""
    preferences = preferring(took_s={"replica1": 0.003}, names=NAMES[:2])
    served = shares(preferences, board_of(replica("replica0"), replica("replica1")))

    assert 0.005 < served["replica1"] / len(SPREAD) < 0.03


def test_a_slow_replica_serves_when_the_fast_ones_are_much_busier() -> None:
    """20 ms of way weigh as much as some reads at work."""
    board = board_of(replica("replica0"), replica("replica1"))
    preferences = preferring(took_s={"replica1": 0.02}, names=NAMES[:2])

    assert shares(preferences, board, load={"replica0": 5})["replica0"] > 0.95 * len(SPREAD)
    assert {"replica1"} == set(shares(preferences, board, load={"replica0": 15}))


def test_a_session_leaves_its_own_replica_when_that_is_much_slower() -> None:
    """It stays where the difference is less than a few reads at work make."""
    for took_s, expected in ((0.02, "replica0"), (0.006, "replica1")):
        leaning = preferring(took_s={"replica1": took_s}).leaning(None)
        board = board_of(replica("replica0"), replica("replica1"))
        choice = choose(read_on("replica1", 50, 100), board, UNBOUNDED, now=NOW, start=3, leaning=leaning)

        assert choice.status is not None
        assert expected == choice.status.name


def test_a_single_slow_answer_counts_for_nothing() -> None:
    """It may be this process that was late."""
    preferences = preferring()
    measured(preferences, "replica0", 0.5, 0.0, 0.5, at=NOW)

    assert preferences.leaning(None) is None
    measured(preferences, "replica0", 0.5, at=NOW + 1.5)
    assert preferences.leaning(None) is not None


def test_a_replica_that_is_back_counts_as_fast_until_it_is_measured_again() -> None:
    """What was measured before was another server, perhaps; nor does one that is gone count for others."""
    preferences = preferring(took_s=dict.fromkeys(NAMES[1:], 0.02))
    assert preferences.leaning(None) is not None
    preferences.forget("replica0")
    assert preferences.leaning(None) is None
    measured(preferences, "replica0", 0.0)
    assert preferences.leaning(None) is None
    measured(preferences, "replica0", 0.0, at=NOW)
    assert preferences.leaning(None) is not None


# --- fifty replicas, and three routers that know nothing of each other ---

REPLICAS = [f"replica{number}" for number in range(50)]
ROUTERS = 3
READS_PER_S = 1000
READ_ROUND_TRIPS = 8
USUAL_S = 0.03
BEAT_S = 0.5
SLOW = "replica7"


class Cluster:
    """Replicas that answer in times of their own, and routers that read from them, under virtual time."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.random = random.Random(7)
        self.now = 0.0
        self.took_s = dict.fromkeys(REPLICAS, USUAL_S)
        self.boards = [board_of() for _ in range(ROUTERS)]
        self.preferences = [Preferences() for _ in range(ROUTERS)]
        self.loads = [dict.fromkeys(REPLICAS, 0) for _ in range(ROUTERS)]
        self.ends: list[tuple[float, int, str]] = []
        for board, preferences in zip(self.boards, self.preferences, strict=True):
            board.on_status.append(preferences.note)
            for name in REPLICAS:
                preferences.add(name, None, weights.get(name, 1.0))
        self.next_beat = 0.0

    def run(self, seconds: float) -> tuple[Counter[str], Counter[str]]:
        """Go on for some time; return how many reads each replica was given, and how many at once at the most."""
        served: Counter[str] = Counter()
        peak: Counter[str] = Counter()
        until = self.now + seconds
        while self.now < until:
            self.now += self.random.expovariate(READS_PER_S)
            if self.now >= self.next_beat:
                self.next_beat = self.now + BEAT_S
                self._beat()
            while self.ends and self.ends[0][0] <= self.now:
                _, number, name = heapq.heappop(self.ends)
                self.loads[number][name] -= 1
            number = self.random.randrange(ROUTERS)
            name = self._read(number)
            served[name] += 1
            self.loads[number][name] += 1
            peak[name] = max(peak[name], sum(load[name] for load in self.loads))
            took_s = READ_ROUND_TRIPS * self.took_s[name] * self.random.uniform(0.5, 1.5)
            heapq.heappush(self.ends, (self.now + took_s, number, name))
        return served, peak

    def _read(self, number: int) -> str:
        choice = choose(
            wrote(1),
            self.boards[number],
            UNBOUNDED,
            now=self.now,
            start=self.random.getrandbits(30),
            load=self.loads[number].__getitem__,
            leaning=self.preferences[number].leaning(None),
        )
        assert choice.status is not None
        return choice.status.name

    def _beat(self) -> None:
        for board in self.boards:
            for name in REPLICAS:
                took_s = self.took_s[name] * self.random.uniform(0.8, 1.3)
                board.publish(replace(replica(name, observed_at=self.now), answered_at=self.now + took_s))


def test_among_fifty_busy_replicas_shares_are_by_weight() -> None:
    """Within a fifth: load moves reads to where it is less."""
    weights = {name: float(1 + number % 3) for number, name in enumerate(REPLICAS)}
    served, _ = Cluster(weights).run(10)
    of_weight = {
        weight: sum(served[name] for name in REPLICAS if weights[name] == weight)
        / sum(weight for name in REPLICAS if weights[name] == weight)
        for weight in (1.0, 2.0, 3.0)
    }
    fair = served.total() / sum(weights.values())

    for share in of_weight.values():
        assert share == pytest.approx(fair, rel=0.2)


def test_a_slow_one_of_fifty_gets_few_reads_and_its_share_and_no_more_once_it_is_well() -> None:
    """Neither starved nor stampeded: ten times slower, and ten seconds after it has recovered."""
    cluster = Cluster({})
    cluster.run(2)
    cluster.took_s[SLOW] = 10 * USUAL_S
    cluster.run(5)  # until that is seen
    served, _ = cluster.run(10)
    fair = served.total() / len(REPLICAS)
    assert 0 < served[SLOW] < 0.2 * fair

    cluster.took_s[SLOW] = USUAL_S
    _, peak = cluster.run(10)
    assert max(peak.values()) < 3 * READS_PER_S * READ_ROUND_TRIPS * USUAL_S / len(REPLICAS)
    served, peak = cluster.run(10)
    fair = served.total() / len(REPLICAS)
    assert 0.7 * fair < served[SLOW] < 1.4 * fair
    assert max(peak.values()) < 3 * READS_PER_S * READ_ROUND_TRIPS * USUAL_S / len(REPLICAS)
