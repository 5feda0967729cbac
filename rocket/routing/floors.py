"""Where the floors of those are kept who carry none themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from rocket.consistency import Lsn
    from rocket.routing.connections import Connection

SubjectT_contra = TypeVar("SubjectT_contra", contravariant=True)


class FloorStore(Protocol[SubjectT_contra]):
    """A row for each subject (a user, say) on the primary that holds the floor of its reads.

    An application passes one to `Router`, which calls it on connections to the primary. What an implementation
    raises by itself (an unknown user, say) reaches the caller of `read` or `write` as it is.
    """

    async def look_up(self, primary: Connection, subject: SubjectT_contra) -> Lsn | None:
        """Return the subject's floor; None where none is recorded, so that only the primary will do.

        `Lsn.UNKNOWN` stands for a write whose commit LSN is not recorded yet. The statement must fail on a
        server that is not the primary, which a call of `pg_current_wal_flush_lsn()` in it ensures, and leave
        nothing in the session, which is not reset after it.
        """

    async def mark(self, primary: Connection, subject: SubjectT_contra, floor: Lsn) -> str | None:
        """Within a write's transaction, set the subject's floor (to `Lsn.UNKNOWN`).

        Return `rocket.FLUSHED`, if the statement has evaluated it, which saves the router one of its own; or None.
        """

    async def settle(self, primary: Connection, subject: SubjectT_contra) -> Lsn:
        """After COMMIT, in a statement of its own, put `pg_current_wal_flush_lsn()` where `Lsn.UNKNOWN` stands.

        Return the LSN put there or, where another write of the subject has seen to it, the flush LSN.
        """

    async def wait_for_writes(self, primary: Connection, subject: SubjectT_contra) -> None:
        """Wait until every write of the subject that has begun to commit is visible on the primary.

        A replica can show a commit before the primary does (design fact F13). In a statement of its own, take a
        lock in shared mode that each write of the subject holds until it is visible: the subject's row, say.
        """
