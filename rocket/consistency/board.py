"""The latest statuses of all nodes: all that a routing decision may look at."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING

from rocket.consistency.lsn import Lsn
from rocket.consistency.origins import Origins
from rocket.consistency.status import rank_of, timeline_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rocket.consistency.status import Epoch, Incarnation, PrimaryStatus, ReplicaStatus
    from rocket.consistency.token import SessionToken

_HISTORY = 600
"""How many advances of the primary are kept to compute lag in seconds: five minutes at two a second. Of more than
these, some of the older ones are forgotten."""
_COARSENESS = 1 / 16
"""How far apart those may then be, beside their age: lag is known well beyond any bound, however often the primary
is asked, and never told an eighth too small."""


class Board:
    """The last status of each replica and of the primary.

    Has no clock and no lock: the observer writes it and the router reads it on one event loop, and times are
    the caller's monotonic seconds.
    """

    def __init__(self) -> None:
        self._replicas: dict[str, ReplicaStatus] = {}
        self._ring: tuple[ReplicaStatus, ...] | None = ()
        self.primary: PrimaryStatus | None = None
        """The primary's last status; kept when it is out of reach, since `max_lag` is measured against it."""
        self.origins = Origins()
        """Which cluster is ours, and the newest epoch that each of its nodes has shown."""
        self.refused: dict[str, str] = {}
        """The nodes that answer and are left alone, each with the reason."""
        self.claimants: set[str] = set()
        """Those of them that are of our cluster, and say that they are the primary."""
        self.abandoned: set[Epoch] = set()
        """Epochs that were followed, and are not part of the history that is followed now: a list of nodes was
        corrected, say. The next primary gets to know them, so that their sessions learn of losses."""
        self.flush_lsn = Lsn(0)
        """The primary's last flush LSN known; before any primary is found, the furthest that a replica has got."""
        self.covered_lsn = Lsn(0)
        """The highest cover of the primary's epoch, below which no replica serves a session's read.

        A new epoch has none: what is in it has all that came before.
        """
        self._distrusted: set[str] = set()
        self._readdressed: set[str] = set()
        self._strayed: dict[str, Incarnation | None] = {}
        """Replicas that follow another history of the epoch's timeline, and in which incarnation."""
        self._followers: dict[str, tuple[Incarnation | None, Lsn]] | None = None
        """Who followed the primary until it was lost, or a rival was seen: in which incarnation, and how far what
        it has replayed is the epoch's WAL. None while the primary is well and has no rival."""
        self._has_rival = False
        """Whether another server claims the current epoch, by its word or since its holder is a replica."""
        self._began_lsn = Lsn(0)
        """The current epoch's row lies at or below this."""
        self._seen_lsn, self._seen_at = Lsn(0), 0.0
        """All WAL up to here was flushed by the current epoch's primary at this time, or earlier."""
        self._claimed_lsn = Lsn(0)
        """The furthest that a token of the current epoch was seen beyond its primary."""
        self._holder_is_gone = False
        """Whether the primary is none of the nodes any more."""
        self.epoch: Epoch | None = None
        """The current epoch; None while it is unknown, or known to be over before its successor is found.

        Before any primary is found it is the newest that replicas show: sessions of it may read there.
        """
        self.primary_is_lost = False
        """Whether the primary did not answer, as a primary, when it was last asked."""
        self.on_new_role: list[Callable[[str], None]] = []
        """Called with a node's name when it is found in another role, or in another epoch, than before."""
        self.on_status: list[Callable[[ReplicaStatus | PrimaryStatus], None]] = []
        """Called with each status that is published."""
        self.on_gone: list[Callable[[str], None]] = []
        """Called with the name of a node whose status is removed."""
        self._passed: list[Lsn] = []
        """Flush LSNs of the primary, ascending."""
        self._passed_at: list[float] = []
        """When it was first seen at each of them."""

    @property
    def replicas(self) -> Sequence[ReplicaStatus]:
        """Every replica that has a status, in the order in which they were first seen."""
        if self._ring is None:
            self._ring = tuple(self._replicas.values())
        return self._ring

    def replica(self, name: str) -> ReplicaStatus | None:
        """Return the status of one replica, or None while it has none."""
        return self._replicas.get(name)

    def current_primary(self, now: float, lease_s: float) -> PrimaryStatus | None:
        """Return the primary if it may be used: it answered when it was last asked, at most `lease_s` ago."""
        if self.primary_is_lost or not self.is_current_epoch(self.epoch, now, lease_s):
            return None
        return self.primary

    def is_current_epoch(self, epoch: Epoch | None, now: float, lease_s: float) -> bool:
        """Return whether an epoch was seen to be the current one at most `lease_s` ago."""
        return (
            self.primary is not None
            and epoch is not None
            and epoch == self.epoch
            and now - self.primary.observed_at <= lease_s
        )

    # --- the observer's side ---

    def publish(self, status: ReplicaStatus) -> bool:
        """Publish a replica's newest status; return False if it is left alone, since its cluster is not ours."""
        name, epoch = status.name, status.epoch
        self._settle_address(name)
        if not self._is_ours(name, status.system_id):
            return False
        self._readmit(name)
        if epoch is not None and self.origins.has_shown(name, epoch):
            self.epoch = None
        if self.primary is None:
            self.flush_lsn = max(self.flush_lsn, status.replay_lsn, status.receive_lsn or Lsn(0))
            if self.epoch is None and epoch is not None and rank_of(epoch) == self.origins.newest:
                self.epoch = epoch
        elif self.primary.name == name and name not in self._replicas:
            self._lose_primary(to_rival=epoch == self.epoch)
            self._notify(name)
        status = self.as_it_counts(status)
        if name in self._distrusted:
            status = replace(status, incarnation=None)
        self._replicas[name] = status
        self._ring = None
        for notify in self.on_status:
            notify(status)
        return True

    def as_it_counts(self, status: ReplicaStatus) -> ReplicaStatus:
        """Return a status without its epoch, or vouching for less, if the replica may follow another history.

        There are two histories of one timeline once a primary has lost WAL: then a replica that has replayed
        beyond the beginning of an epoch had the earlier one's row, and should it get the row later in the same
        incarnation, then by going on, past the fork, with WAL that is not its own. And there are two while another
        server claims the epoch: what comes from there has the row, too. So only the incarnations count that
        followed the epoch's primary, and what they had replayed. While the primary is lost, there may be a rival
        that was not seen yet: a new incarnation may be its copy.
        """
        if status.epoch is None or self.epoch is None or timeline_of(status.epoch) != timeline_of(self.epoch):
            return status
        if rank_of(status.epoch) < rank_of(self.epoch) and status.replay_lsn > self._began_lsn:
            self._strayed[status.name] = status.incarnation
            return status
        if self._followers is not None:
            incarnation, lsn = self._followers.get(status.name, (None, Lsn(0)))
            is_known = status.vouches_for(incarnation)
            if self._has_rival and is_known:
                status = replace(status, streaming=False, streamed_lsn=min(lsn, status.vouched_lsn))
            elif self._has_rival:
                self._strayed[status.name] = status.incarnation
            elif is_known:
                self._followers[status.name] = incarnation, status.vouched_lsn
            elif status.incarnation is not None:
                return replace(status, epoch=None, streaming=False)
        if self._strayed.get(status.name, "") == status.incarnation:
            return replace(status, epoch=None, streaming=False)
        return status

    def _is_ours(self, name: str, system_id: int | None) -> bool:
        """Return whether a node that answers is one of our cluster, or of one that has taken its place."""
        holder = None if self.primary is None else self.primary.name
        before = self.origins.system_id
        if self.origins.is_ours(name, system_id, holder):
            if before not in {None, self.origins.system_id}:
                self._begin_cluster()
            return True
        self._leave_alone(
            name, f"it is of another cluster: its system identifier is {system_id}, and that of ours {before}"
        )
        return False

    def _begin_cluster(self) -> None:
        """Forget all that was known: it is of a cluster of which no node is left."""
        for name in list(self._replicas):
            self.forget(name)
        if self.primary is not None:
            self.abandoned.add(self.primary.epoch)
            self._notify(self.primary.name)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.primary = self.epoch = None
        self.primary_is_lost = self._holder_is_gone = False
        self.flush_lsn = self.covered_lsn = Lsn(0)
        self._forget_followers()
        self._forget_advances()

    def _readmit(self, name: str) -> None:
        self.refused.pop(name, None)
        self.claimants.discard(name)

    def _leave_alone(self, name: str, why: str) -> None:
        self.forget(name)
        self.refused[name] = why
        self._notify(name)

    def distrust(self, name: str) -> None:
        """Have statuses of this name vouch for no connection, since several servers share its address.

        These statuses have no incarnation.
        """
        self._distrusted.add(name)
        if (status := self._replicas.get(name)) is not None:
            self._replicas[name] = replace(status, incarnation=None)
            self._ring = None

    def trust(self, name: str) -> None:
        """Undo `distrust`: the name stands for another server, or for none."""
        self._distrusted.discard(name)

    def forget(self, name: str) -> None:
        """Remove a node's status: it is out of reach. The last status of a primary is kept."""
        known = self._replicas.pop(name, None) is not None
        self._settle_address(name)
        self._readmit(name)
        self.origins.fell_silent(name)
        if known:
            self._ring = None
        if self.primary is not None and self.primary.name == name:
            known = known or not self.primary_is_lost
            self._lose_primary()
        if known:
            for notify in self.on_gone:
                notify(name)

    def remove(self, name: str) -> None:
        """Forget a node that is none of the router's any more, and what follows from its answers alone.

        Where it alone had shown the newest epoch, the primary that is left is followed again.
        """
        self._readdressed.add(name)
        self.forget(name)
        if self.primary is not None and self.primary.name == name:
            self._holder_is_gone = True

    def readdress(self, name: str) -> None:
        """Note that a node is asked at another address from now on: the former one may have been wrong.

        Once it answers there, or does not, nothing counts any more that it has shown at the former one.
        """
        self._readdressed.add(name)

    def _settle_address(self, name: str, epoch: Epoch | None = None) -> None:
        if name not in self._readdressed:
            return
        self._readdressed.discard(name)
        if epoch is not None and self.primary is not None and self.primary.epoch == epoch:
            return  # it is what it was
        self._strayed.pop(name, None)
        if self.origins.remove(name):
            newest = self.origins.newest
            if self.epoch is not None and rank_of(self.epoch) > newest:
                self.epoch = None
            if self.primary is not None and rank_of(self.primary.epoch) > newest:
                self.abandoned.add(self.primary.epoch)
                self._notify(self.primary.name)
                self._begin_anew()

    def note_flush(self, epoch: Epoch, lsn: Lsn, now: float) -> None:
        """Note that the primary of an epoch has flushed its WAL up to here: a write was told so."""
        if epoch == self.epoch and lsn > self._seen_lsn:
            self._seen_lsn, self._seen_at = lsn, now

    def note_claim(self, token: SessionToken) -> bool:
        """Note a token beyond all that the primary has written; return whether it may be right.

        Tokens are not signed. So what one says counts only where the primary was restarted since its epoch was
        named, and thus may have been set back: for that a new epoch begins, but one for each restart at the most.
        """
        if self.primary is None or not self.primary.restarted or token.epoch != self.epoch:
            return False
        floors = (token.write_floor, token.read_floor or Lsn(0))
        self._claimed_lsn = max(self._claimed_lsn, *(floor for floor in floors if floor < Lsn.PENDING))
        return True

    def has_lost(self, status: PrimaryStatus) -> bool:
        """Return whether a server that answers as the primary lacks WAL of its epoch, and must begin a new one.

        So it is if its flush LSN, asked for later, lies below what that epoch's primary had flushed, as was seen
        of it, of a replica or of a token (it was set back to a snapshot); and if it is not the server that held
        the epoch, which is none of the nodes any more, or a replica by now (a failover without a new timeline).
        Otherwise `publish_primary` decides.
        """
        if not self.origins.may_be_ours(status.system_id):
            return False
        before = self.primary
        rank = rank_of(status.epoch)
        if before is not None and not self._is_holder(status, before):
            is_free = self._holder_is_gone or before.name in self._replicas
            return is_free and status.epoch == before.epoch and rank == self.origins.newest
        if before is not None and before.epoch == status.epoch and self._seen_at < status.observed_at:
            claimed_lsn = self._claimed_lsn if status.restarted else Lsn(0)
            has_fallen = status.flush_lsn < max(self._seen_lsn, claimed_lsn) or (
                # It may have written as much since: what it had when it was started counts.
                status.started != before.started and status.checkpoint_lsn < self._seen_lsn
            )
        else:  # of the newest epoch not even the row may be left
            has_fallen = before is not None and rank < self.origins.newest and rank[0] == self.origins.newest[0]
        if has_fallen or rank < self.origins.newest:
            return has_fallen
        return any(
            replica.epoch == status.epoch
            and replica.answered_at < status.observed_at
            and replica.replay_lsn > status.flush_lsn
            for replica in self.replicas
            if replica.system_id is not None
        )

    def _is_holder(self, status: PrimaryStatus, before: PrimaryStatus) -> bool:
        """Return whether it is the server that was the primary before: by its name, or since it runs as it did."""
        return status.name == before.name or (status.started is not None and status.started == before.started)

    def publish_primary(self, status: PrimaryStatus) -> bool:
        """Publish a primary's newest status, and remember when its flush LSN was first seen.

        Return False, and have its connections ended, if it is not the one to follow: it is of another cluster; or
        its epoch is older than one that a node has shown; or it claims the timeline of another primary that still
        answers, or the epoch of another server; or it has lost WAL of its epoch.
        """
        name = status.name
        self._settle_address(name, status.epoch)
        if self._replicas.pop(name, None) is not None:
            self._ring = None
            self._notify(name)  # what was opened to a replica shall not read from a primary
        if not self._is_ours(name, status.system_id):
            return False
        why = self._against(status)
        if why is not None:
            self.refused[name] = why
            self.claimants.add(name)
            self._notify(name)
            self._note_followers(has_rival=status.epoch == self.epoch)
            return False
        self._readmit(name)
        if not self.claimants:
            self._forget_followers()
        before = self.primary
        self.origins.has_shown(name, status.epoch)
        self.abandoned.discard(status.epoch)
        self.epoch = status.epoch
        self.primary = status
        self.flush_lsn = status.flush_lsn
        self.primary_is_lost = self._holder_is_gone = False
        if before is None or before.epoch != status.epoch:
            self._begin_epoch(status)
        self.covered_lsn = max(self.covered_lsn, status.covered_lsn)
        if status.flush_lsn >= self._seen_lsn:
            self._seen_lsn, self._seen_at = status.flush_lsn, status.observed_at
        if before is not None and (before.name, before.epoch) != (name, status.epoch):
            self._succeed(before, status)
        if not self._passed or status.flush_lsn > self._passed[-1]:
            self._note_advance(status.flush_lsn, status.observed_at)
        for notify in self.on_status:
            notify(status)
        return True

    def _against(self, status: PrimaryStatus) -> str | None:
        """Return why a server of our cluster is not the primary to follow; None if it is."""
        before = self.primary
        if self.has_lost(status):
            return f"it lacks what was written in epoch {status.epoch}"
        if rank_of(status.epoch) < self.origins.newest:
            return f"epoch {status.epoch} is over"
        if before is not None and before.name != status.name:
            if rank_of(status.epoch) > rank_of(before.epoch):
                return None
            if status.epoch == before.epoch and not self._is_holder(status, before):
                return (
                    f"it claims epoch {status.epoch} of {before.name}, and is another server, without a timeline "
                    "of its own (a copy, or a replica whose standby.signal was removed: promote it, or take "
                    f"{before.name} off the list of nodes)"
                )
            if not self.primary_is_lost:
                return f"epoch {status.epoch} is over, or a copy"
        return None

    def _succeed(self, before: PrimaryStatus, status: PrimaryStatus) -> None:
        self._forget_advances()  # they are another primary's
        for name in {before.name, status.name}:
            self._notify(name)
        if rank_of(status.epoch) <= rank_of(before.epoch) and status.epoch != before.epoch:
            self.abandoned.add(before.epoch)

    def _begin_epoch(self, status: PrimaryStatus) -> None:
        self._began_lsn, self._claimed_lsn, self.covered_lsn = status.flush_lsn, Lsn(0), Lsn(0)
        self._seen_lsn, self._seen_at = status.flush_lsn, status.observed_at
        self._forget_followers()
        self._strayed.clear()
        for replica in self.replicas:
            self.as_it_counts(replica)

    def _lose_primary(self, *, to_rival: bool = False) -> None:
        self.primary_is_lost = True
        self._note_followers(has_rival=to_rival)

    def _note_followers(self, *, has_rival: bool) -> None:
        """Note who follows the primary as long as that is certain."""
        if self._followers is None and (has_rival or self.primary_is_lost):
            self._followers = {
                replica.name: (replica.incarnation, replica.vouched_lsn) for replica in self.replicas
            }
        self._has_rival |= has_rival

    def _forget_followers(self) -> None:
        self._followers, self._has_rival = None, False

    def _notify(self, name: str) -> None:
        for notify in self.on_new_role:
            notify(name)

    # --- lag ---

    def lag_bytes(self, status: ReplicaStatus) -> int | None:
        """Return how much WAL the replica has yet to replay, against the primary's last flush LSN known."""
        if self.primary is None:
            return None
        return max(0, self.primary.flush_lsn - status.replay_lsn)

    def lag_seconds(self, status: ReplicaStatus, now: float) -> float | None:
        """Return how long ago the primary was first seen beyond what a replica has replayed; 0.0 if it never was.

        The resolution is the observer's interval, and coarser for what is long ago. A replica behind all that was
        seen of this primary gets the age of the first sight, which is a lower bound. While the primary is lost the
        lag is what it was when that was last seen: what is written since is unknown.
        """
        if self.primary is None:
            return None
        first_beyond = bisect_right(self._passed, status.replay_lsn)
        if first_beyond == len(self._passed):
            return 0.0
        if self.primary_is_lost:
            now = min(now, self.primary.observed_at)
        return max(0.0, now - self._passed_at[first_beyond])

    def age_s(self, status: ReplicaStatus, now: float) -> float | None:
        """Return how old what a replica shows is at the most, in seconds; None if that is unknown.

        All that was acknowledged so long ago it shows: the primary was asked then, and what it had flushed is what
        the replica has replayed. So the age grows while the primary is not heard of.
        """
        if self.primary is None:
            return None
        if status.vouched_lsn >= self.primary.flush_lsn:
            return max(0.0, now - self.primary.observed_at)
        beyond = bisect_right(self._passed, status.vouched_lsn)
        return max(0.0, now - self._passed_at[beyond - 1]) if beyond else None

    def _note_advance(self, flush_lsn: Lsn, at: float) -> None:
        if len(self._passed) >= _HISTORY:
            self._thin_out_advances(at)
        self._passed.append(flush_lsn)
        self._passed_at.append(at)

    def _thin_out_advances(self, now: float) -> None:
        at = self._passed_at
        kept = [len(at) - 1]
        for i in range(len(at) - 2, 0, -1):
            newer_at = at[kept[-1]]
            if newer_at - at[i] > _COARSENESS * (now - newer_at):
                kept.append(i)
        kept.append(0)
        kept.reverse()
        self._passed = [self._passed[i] for i in kept]
        self._passed_at = [at[i] for i in kept]

    def _forget_advances(self) -> None:
        self._passed.clear()
        self._passed_at.clear()

    def has_diverged(self, status: ReplicaStatus) -> bool:
        """Return whether a replica has replayed more than its primary had flushed when that was asked later.

        Then what it has replayed is not, or not all, that primary's WAL.
        """
        return (
            self.primary is not None
            and self.primary.observed_at >= status.answered_at
            and self.primary.flush_lsn < status.replay_lsn
        )
