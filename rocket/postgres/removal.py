"""Removes directories of servers, with the shared memory that those leave which did not end in order.

Each server has a System V segment of 56 bytes, by which Postgres notices processes that outlived their postmaster.
After a SIGKILL it stays until the same directory is started again. If that goes, it would stay for ever, and the
kernel allows 4,096 of them (macOS 32). All else that servers share is unnamed, or a file of theirs.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_PATIENCE_S = 2.0
"""For processes that were just killed, and have yet to go."""
_POLL_S = 0.01
_LOCK_FILE = "postmaster.pid"
_SEGMENT_LINE = 6
_KEYS = 2**32
_KEYS_TRIED = 64
_IPC_RMID, _IPC_STAT = 0, 2

_libc = ctypes.CDLL(None)
_log = logging.getLogger("rocket.cluster")


def remove_for_good(directory: Path, *, ignore_errors: bool = False) -> None:
    """Remove a directory, and the shared memory of each server whose data directory is in it, or is it.

    Nothing in it may be started again. Segments that a process is still attached to after two seconds are left;
    that is logged. Raise `OSError` where the directory cannot be removed, unless errors are ignored.
    """
    deadline = time.monotonic() + _PATIENCE_S
    for path, directories, files in os.walk(directory):
        if _LOCK_FILE in files:
            directories.clear()
            if (named := _NamedSegment.read(Path(path))) is not None:
                _remove_segment(named, deadline)
    shutil.rmtree(directory, ignore_errors=ignore_errors)


@dataclass(frozen=True, slots=True)
class _NamedSegment:
    """The segment that the lock file of a data directory names, and what the directory says of it."""

    identifier: int
    key: int
    creator: int
    """The id of the process that made it: the postmaster, or a server of one process, as initdb has it."""
    owner: int
    """The user id of the directory's owner; Postgres starts for nobody else."""
    inode: int

    @classmethod
    def read(cls, data_dir: Path) -> Self | None:
        """Return None where no segment is named: the server ended in order, or too early to have one."""
        try:
            lines = (data_dir / _LOCK_FILE).read_text().splitlines()
            key, identifier = map(int, lines[_SEGMENT_LINE].split())
            status = data_dir.stat()
            return cls(identifier, key % _KEYS, abs(int(lines[0])), status.st_uid, status.st_ino)
        except (OSError, ValueError, IndexError):
            return None

    def is_that(self, status: _LinuxStatus | _DarwinStatus) -> bool:
        """Tell whether a segment is the one that a server of this directory made, and nobody else's since.

        Postgres takes the directory's inode for a key, or the next one that is free: a lock file that was copied
        names the segment of another directory, which may be started again.
        """
        return (
            (status.key, status.creator, status.owner) == (self.key, self.creator, self.owner)
            and (self.key - self.inode) % _KEYS < _KEYS_TRIED
        )  # fmt: skip


class _LinuxStatus(ctypes.Structure):
    """A 64-bit kernel's `shmid64_ds`, as far as we look. On 32 bits nothing in it fits, and nothing is removed."""

    _fields_ = (
        ("key", ctypes.c_uint32),
        ("owner", ctypes.c_uint32),
        ("_permissions", ctypes.c_char * 40),
        ("_size_and_times", ctypes.c_char * 32),
        ("creator", ctypes.c_int32),
        ("_last", ctypes.c_int32),
        ("attached", ctypes.c_uint64),
        ("_reserved", ctypes.c_char * 64),
    )


class _DarwinStatus(ctypes.Structure):
    """The same on macOS: `__shmid_ds_new`."""

    _fields_ = (
        ("owner", ctypes.c_uint32),
        ("_permissions", ctypes.c_char * 16),
        ("key", ctypes.c_uint32),
        ("_size_and_last", ctypes.c_char * 12),
        ("creator", ctypes.c_int32),
        ("attached", ctypes.c_uint16),
        ("_reserved", ctypes.c_char * 64),
    )


_Status = _DarwinStatus if sys.platform == "darwin" else _LinuxStatus


def _remove_segment(named: _NamedSegment, deadline: float) -> None:
    """Remove a segment as soon as nobody is attached to it; leave it at the deadline, or if it is another one."""
    status = _Status()
    while _libc.shmctl(named.identifier, _IPC_STAT, ctypes.byref(status)) == 0 and named.is_that(status):
        if not status.attached:
            _libc.shmctl(named.identifier, _IPC_RMID, None)
            return
        if time.monotonic() > deadline:
            _log.warning("shared memory segment %d is left: a process still uses it", named.identifier)
            return
        time.sleep(_POLL_S)
