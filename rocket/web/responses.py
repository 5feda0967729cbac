"""What a response tells the client of its session."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rocket import Session
    from rocket.web.carriers import Carrier, Values

NOT_TO_BE_CACHED = ("Cache-Control", "no-store")
"""A read that a cache answers is no read; for responses that say nothing about it themselves."""


def session_fields(
    session: Session, carrier: Carrier, values: Values, *, secure: bool
) -> Sequence[tuple[str, str]]:
    """Return the header fields that go with whatever the session has done by now.

    `Rocket-Lost` tells, in so many words, what a promotion may have cost it.
    """
    fields = list(carrier.hand_out(session, values, secure=secure))
    if session.lost is not None:
        fields.append(("Rocket-Lost", str(session.lost)))
    return fields
