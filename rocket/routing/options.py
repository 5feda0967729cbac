"""What a router can be told beside its nodes and floors, for type checkers."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from rocket.consistency import Policy
    from rocket.routing.connections import Work
    from rocket.routing.limits import Limits
    from rocket.routing.observer import MayLead
    from rocket.routing.rules import Routing
    from rocket.routing.waiting import Waiting


class Options(TypedDict, total=False):
    """The parameters that `Router.open` takes by name; it says what they mean."""

    policy: Policy | None
    limits: Limits | None
    routing: Routing
    observe: bool
    observer_interval_s: float
    may_lead: MayLead | None
    waiting: Waiting | None
    init: Work[None] | None
