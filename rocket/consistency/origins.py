"""Which cluster is ours, and what its nodes have shown of its epochs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rocket.consistency.status import rank_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rocket.consistency.status import Epoch, Rank

_NONE: Rank = (0, 0)


class Origins:
    """Remembers the system identifier that each node has shown, and its newest epoch.

    Our cluster is that of the node which was heard first; where several are heard at once, as at the start, that
    of the most nodes. It stays ours as long as a node of it answers. After that another one takes its place: under
    the primary's own name (the cluster was made anew there, by initdb or pg_upgrade), or once no node is left that
    was of ours when it last answered.
    """

    def __init__(self) -> None:
        self.system_id: int | None = None
        """The system identifier of our cluster; None before a node has answered."""
        self.newest: Rank = _NONE
        """The rank of the newest epoch that a node of our cluster has shown."""
        self._of: dict[str, int] = {}
        self._silent: set[str] = set()
        self._ranks: dict[str, Rank] = {}

    def settle(self, found: Mapping[str, int]) -> None:
        """Choose our cluster by what several nodes have answered: that of the most nodes, of several the first."""
        self._of.update(found)
        if self.system_id is None:
            self.system_id = next((most for most, _ in Counter(found.values()).most_common(1)), None)

    def may_be_ours(self, system_id: int | None) -> bool:
        """Return whether nothing speaks for another cluster."""
        return system_id is None or self.system_id in (None, system_id)

    def is_ours(self, name: str, system_id: int | None, primary: str | None) -> bool:
        """Return whether a node that answers is of our cluster, or of the one that has just taken its place."""
        if system_id is None:
            return True
        self._of[name] = system_id
        self._silent.discard(name)
        if self.system_id is None:
            self.system_id = system_id
        if system_id == self.system_id:
            return True
        left = {other for other, its_id in self._of.items() if its_id == self.system_id}
        if left and not (name == primary and left <= self._silent):
            self._ranks.pop(name, None)
            return False
        self.system_id = system_id
        self._ranks.clear()
        self.newest = _NONE
        return True

    def fell_silent(self, name: str) -> None:
        """Note that a node is out of reach."""
        self._silent.add(name)

    def has_shown(self, name: str, epoch: Epoch) -> bool:
        """Note an epoch that a node shows; return whether it is newer than all that were shown before.

        A node that shows an older one later (it has crashed, or was a primary and is thawed) takes nothing back.
        """
        rank = rank_of(epoch)
        if rank > self._ranks.get(name, _NONE):
            self._ranks[name] = rank
        if rank <= self.newest:
            return False
        self.newest = rank
        return True

    def remove(self, name: str) -> bool:
        """Forget what a node has shown; return whether the newest epoch is an older one for it."""
        self._of.pop(name, None)
        self._silent.discard(name)
        self._ranks.pop(name, None)
        before, self.newest = self.newest, max(self._ranks.values(), default=_NONE)
        return self.newest < before
