"""What a router can be told beside its nodes and floors, for type checkers."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from rocket.consistency import Policy
    from rocket.routing.catchup import Waiting
    from rocket.routing.connection import Work
    from rocket.routing.limits import Limits
    from rocket.routing.observer import MayBePrimary
    from rocket.routing.rules import Routing


class Options(TypedDict, total=False):
    """The parameters that `Router.open` takes by name; it says what they mean."""

    policy: Policy | None
    limits: Limits | None
    routing: Routing
    observe: bool
    observer_interval_s: float
    may_be_primary: MayBePrimary | None
    waiting: Waiting | None
    init: Work[None] | None
