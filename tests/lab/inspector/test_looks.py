"""Which looks at replicas viewers are told of."""

from __future__ import annotations

from rocket import Lsn
from rocket.consistency import Incarnation, ReplicaStatus
from rocket.lab.inspector.looks import Looks


def told(looks: Looks, *seen: tuple[float, int]) -> list[float]:
    """Look at a replica at certain times, with what it has replayed; return the times of the looks told of."""
    told_of = []
    for at, replayed in seen:
        status = ReplicaStatus("replica0", Lsn(replayed), Incarnation("1"), observed_at=at)
        told_of += [look_at for look_at, _ in looks.worth_telling(status, at)]
    return told_of


def test_a_change_is_told_together_with_the_last_look_before_it() -> None:
    """It came in between; of the looks before that, one in a tenth of a second is enough."""
    assert [0.0, 0.03, 0.04] == told(Looks(), (0.0, 1), (0.01, 1), (0.02, 1), (0.03, 1), (0.04, 2))
    assert [0.0, 0.15] == told(Looks(), (0.0, 1), (0.05, 1), (0.15, 1), (0.2, 1))


def test_a_thousand_changes_a_second_are_not_all_told() -> None:
    """As long as the batch lasts; the next one begins with what was seen last."""
    looks = Looks()
    assert len(told(looks, *((number / 1000, number) for number in range(50)))) <= 21
    looks.refill()
    assert [0.049, 0.05] == told(looks, (0.05, 50))
