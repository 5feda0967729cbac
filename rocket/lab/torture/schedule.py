"""The schedule of faults: a pure function of a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket.lab.torture.faults import API, FAULTS, PRIMARY, PROCESS, REPLICA

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

ROUND_S = 10.0
"""About how long a round is: faults, and then a moment without any."""
_CALM_S = 1.2
"""The moment without faults at the end of each round."""
_SLOT_S = 3.2
"""About how much time one fault has, with the pause after it."""
SHORTEST_SLOT_S = 0.8
"""In less time a fault would have no effect on clients."""
_LONGEST_START_S = 0.3
_LANES_FOR_REPLICAS = 2
"""How many replicas may have a fault of their own at a time."""

_SINGLE_LANES = (PRIMARY, API, PROCESS)
"""Each has one sequence of faults; replicas have two."""


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """One fault to come."""

    name: str
    at: float
    """Seconds since the schedule began."""
    until: float
    lane: str
    """Which of the sequences it belongs to: `primary`, `replica 0`, ..."""
    choice: float
    """At least 0, less than 1: picks one of the nodes that it may hit."""

    @property
    def length_s(self) -> float:
        """How long it lasts."""
        return self.until - self.at


def shortest_duration_s(names: Collection[str]) -> float:
    """Return how many seconds a schedule with each of these faults once takes."""
    busiest = max(_slots_of(name for name in names if FAULTS[name].lane == lane) for lane in _SINGLE_LANES)
    of_replicas = -(-_slots_of(name for name in names if FAULTS[name].lane == REPLICA) // _LANES_FOR_REPLICAS)
    return _CALM_S + max(busiest, of_replicas) * SHORTEST_SLOT_S


def _slots_of(names: Iterable[str]) -> int:
    return sum(FAULTS[name].slots for name in names)


def plan(seed: int, duration_s: float, names: Collection[str], replicas: int) -> tuple[PlannedFault, ...]:
    """Return the faults of a run in the order of their beginning: each of `names` at least once, all over in time.

    The same arguments always give the same plan. Faults of the primary follow one another, as do those of the API;
    at most two replicas, and never all, have a fault of their own at a time. Raise `ValueError` for an unknown
    name, a duration that is too short, and fewer than two replicas.
    """
    if unknown := sorted(set(names) - FAULTS.keys()):
        raise ValueError(f"there is no fault {', '.join(unknown)}: there are {', '.join(FAULTS)}")
    if names and replicas < 2:  # noqa: PLR2004
        raise ValueError("faults need two replicas at the least")
    if not names:
        return ()
    if duration_s < (needed := shortest_duration_s(names)):
        raise ValueError(f"{len(set(names))} faults need {needed:.1f} s at the least")
    chance = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    rounds = _rounds(duration_s, names)
    faults: list[PlannedFault] = []
    for lane, lane_names in _lanes(sorted(set(names)), replicas):
        faults += _lane(lane, lane_names, duration_s / rounds, rounds, chance)
    return tuple(sorted(faults, key=lambda fault: (fault.at, fault.lane)))


def _rounds(duration_s: float, names: Collection[str]) -> int:
    """Return the number of rounds: as many as leave room for every fault."""
    rounds = max(1, round(duration_s / ROUND_S))
    while rounds > 1 and duration_s / rounds < shortest_duration_s(names) / rounds + _CALM_S + SHORTEST_SLOT_S:
        rounds -= 1
    return rounds


def _lanes(names: list[str], replicas: int) -> Iterator[tuple[str, list[str]]]:
    """Distribute the faults over the sequences that run beside one another."""
    for lane in _SINGLE_LANES:
        if of_lane := [name for name in names if FAULTS[name].lane == lane]:
            yield lane, of_lane
    of_replicas = [name for name in names if FAULTS[name].lane == REPLICA]
    lanes = min(_LANES_FOR_REPLICAS, replicas - 1, len(of_replicas))
    for number in range(lanes):
        yield f"{REPLICA} {number}", of_replicas[number::lanes]


def _lane(
    lane: str, names: list[str], round_s: float, rounds: int, chance: random.Random
) -> Iterator[PlannedFault]:
    """Plan one sequence: each round is cut into slots of the same length, of which a fault takes one or more."""
    slots = [max(1, round((round_s - _CALM_S) / _SLOT_S))] * rounds
    for number in range(max(0, _slots_of(names) - sum(slots))):  # more faults than slots: shorter ones
        slots[number % rounds] += 1
    queue = _shuffled(names, chance)
    for number, count in enumerate(slots):
        of_round: list[str] = []
        while _slots_of(of_round) < count:
            queue = queue or _shuffled(names, chance)
            of_round.append(queue.pop())
        slot_s = (round_s - _CALM_S) / _slots_of(of_round)  # the last one may take more than there were
        begins = number * round_s
        for name in of_round:
            own_s = slot_s * FAULTS[name].slots
            at = begins + chance.uniform(0, min(_LONGEST_START_S, own_s / 4))
            length_s = min(own_s * chance.uniform(0.5, 0.7), FAULTS[name].longest_s)
            begins += own_s
            yield PlannedFault(name, round(at, 3), round(at + length_s, 3), lane, chance.random())


def _shuffled(names: list[str], chance: random.Random) -> list[str]:
    return chance.sample(names, len(names))
