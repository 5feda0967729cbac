"""The operating system's account that the servers run as."""

from __future__ import annotations

import os
import pwd
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket.errors import SetupError

if TYPE_CHECKING:
    from pathlib import Path

_CANDIDATES = ("postgres", "nobody")
"""Existing unprivileged accounts that root hands the servers to, the best first."""


@dataclass(frozen=True, slots=True)
class Account:
    """An unprivileged account, since Postgres refuses to run as root."""

    name: str
    uid: int
    gid: int

    def become(self) -> None:
        """Turn this process into the account's, for good. Only for a child between fork and exec."""
        os.setgroups([])
        os.setgid(self.gid)
        os.setuid(self.uid)

    def own(self, path: Path) -> None:
        """Make the account the owner of a file or directory, not of what is in it."""
        os.chown(path, self.uid, self.gid)

    def can_enter(self, directory: Path) -> bool:
        """Tell whether the account may pass through every directory on the way to, and into, this one."""
        for step in (directory, *directory.parents):
            status = step.stat()
            if status.st_uid == self.uid:
                needed = stat.S_IXUSR
            elif status.st_gid == self.gid:
                needed = stat.S_IXGRP
            else:
                needed = stat.S_IXOTH
            if not status.st_mode & needed:
                return False
        return True


def server_account() -> Account | None:
    """Return the account that servers must run as, or None when that is the one we have.

    Raise `SetupError` as root on a machine that has no unprivileged account known here.
    """
    if os.geteuid() != 0:
        return None
    for name in _CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise SetupError(
        f"Postgres does not run as root, and there is no account {' or '.join(_CANDIDATES)} to hand it to: "
        "run rocket as an ordinary user"
    )
