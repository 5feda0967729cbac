"""What was done to the cluster, and for how long, as the faults of a history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rocket.consistency import PrimaryStatus
from rocket.lab.checker.history import Fault
from rocket.lab.inspector.event_log import Faulted, Gone, Seen

if TYPE_CHECKING:
    from rocket.cluster.cluster import CarriedOut
    from rocket.lab.inspector.event_log import Happening

_UNDONE_BY = {"resume": "pause", "thaw": "freeze", "mend": "cut", "start": "stop"}
_LASTING = {"pause", "freeze", "cut", "stop", "delay"}
_PASSING = {"kill", "kill-backend", "restart", "promote"}
"""They last until the node is seen again."""


@dataclass(slots=True)
class _Incident:
    name: str
    node: str | None
    at: float
    until: float | None
    """None while it lasts."""
    detail: dict[str, Any]
    gone: bool = False


class Incidents:
    """Collected from happenings in their order."""

    def __init__(self) -> None:
        self._all: list[_Incident] = []
        self._lasting: dict[tuple[str, str | None], _Incident] = {}
        """Until somebody undoes them, by name and node."""
        self._passing: list[_Incident] = []
        self._primary: tuple[float, PrimaryStatus] | None = None

    @property
    def outstanding(self) -> bool:
        """Whether something is not undone."""
        return bool(self._lasting)

    def take(self, happening: Happening) -> None:
        """Take account of one."""
        match happening:
            case Faulted(at, done) if done.ok:
                self._command(at, done)
            case Gone(_, name):
                for incident in self._passing:
                    incident.gone = incident.gone or incident.node == name
            case Seen(at, status):
                if isinstance(status, PrimaryStatus):
                    self._reign(at, status)
                for incident in self._passing:
                    if incident.node == status.name and incident.gone:
                        incident.until = at
                self._passing = [one for one in self._passing if not (one.node == status.name and one.gone)]

    def _command(self, at: float, done: CarriedOut) -> None:
        if done.command == "heal":
            for incident in self._lasting.values():
                incident.until = at
            self._lasting.clear()
            return
        undone = _UNDONE_BY.get(done.command, done.command)
        before = self._lasting.pop((undone, done.node), None)
        if before is not None:
            before.until = at
        if done.command not in _LASTING | _PASSING or (done.command == "delay" and not done.delay_ms):
            return
        detail = {} if done.delay_ms is None else {"delay_ms": done.delay_ms}
        incident = _Incident(done.command, done.node, done.began, None, detail)
        self._all.append(incident)
        if done.command in _PASSING:
            incident.until = at
            self._passing.append(incident)
        else:
            self._lasting[done.command, done.node] = incident

    def _reign(self, at: float, status: PrimaryStatus) -> None:
        """Take another primary, whoever made it one, for the outcome of a promotion."""
        before, self._primary = self._primary, (at, status)
        if before is not None and before[1].epoch != status.epoch:
            self._all.append(_Incident("promotion", status.name, before[0], at, {"old": before[1].name}))

    def faults(self, zero: float, end: float) -> list[Fault]:
        """Return those that concern the time between two moments; what lasts, lasts until its end."""
        return [
            Fault(
                name=one.name,
                at=round(max(zero, one.at) - zero, 6),
                until=round(min(end, end if one.until is None else one.until) - zero, 6),
                node=one.node,
                detail=one.detail,
            )
            for one in self._all
            if one.at <= end and (one.until is None or one.until >= zero)
        ]
