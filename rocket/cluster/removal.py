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
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE_S = 2.0
"""For processes that were just killed, and have yet to go."""
_POLL_S = 0.01
_KEYS_TRIED = 16
_IPC_RMID, _IPC_STAT, _SHM_RDONLY = 0, 2, 0o10000
_HEADER = struct.Struct("=ii")
"""How Postgres begins each segment: with a number of its own, and the process that made it."""
_POSTGRES = 679834894
_HEADER_END = struct.Struct("=QQ")
"""How it ends it: with the device and inode of the data directory."""

_libc = ctypes.CDLL(None)
_libc.shmat.restype = ctypes.c_void_p
_libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.shmdt.argtypes = (ctypes.c_void_p,)
_FAILED = ctypes.c_void_p(-1).value

_log = logging.getLogger("rocket.cluster")


def remove_for_good(directory: Path, *, ignore_errors: bool = False) -> None:
    """Remove a directory, and the shared memory of each server whose data directory is in it, or is it.

    Nothing in it may be started again. Segments that a process is still attached to after two seconds are left;
    that is logged. Raise `OSError` where the directory cannot be removed, unless errors are ignored.
    """
    deadline = time.monotonic() + _PATIENCE_S
    for path, _, _ in os.walk(directory):
        for identifier in _segments_of(Path(path)):
            _remove_segment(identifier, deadline)
    shutil.rmtree(directory, ignore_errors=ignore_errors)


class _LinuxStatus(ctypes.Structure):
    """The 64-bit kernel's `shmid64_ds`, as far as we look."""

    _fields_ = (
        ("_key", ctypes.c_uint32),
        ("owner", ctypes.c_uint32),
        ("_permissions", ctypes.c_char * 40),
        ("size", ctypes.c_uint64),
        ("_times", ctypes.c_char * 24),
        ("creator", ctypes.c_int32),
        ("_last", ctypes.c_int32),
        ("attached", ctypes.c_uint64),
        ("_reserved", ctypes.c_char * 64),
    )


class _DarwinStatus(ctypes.Structure):
    """The same on macOS: `__shmid_ds_new`."""

    _fields_ = (
        ("owner", ctypes.c_uint32),
        ("_permissions", ctypes.c_char * 20),
        ("size", ctypes.c_uint64),
        ("_last", ctypes.c_int32),
        ("creator", ctypes.c_int32),
        ("attached", ctypes.c_uint16),
        ("_reserved", ctypes.c_char * 64),
    )


_Status = _DarwinStatus if sys.platform == "darwin" else _LinuxStatus


def _status(identifier: int) -> _LinuxStatus | _DarwinStatus | None:
    """Return what the kernel says of a segment; None if it is gone, or not for us to see."""
    status = _Status()
    return status if _libc.shmctl(identifier, _IPC_STAT, ctypes.byref(status)) == 0 else None


def _segments_of(data_dir: Path) -> Iterator[int]:
    """Find the segments that servers of a directory have made, whatever its files say of that.

    Postgres takes the directory's inode for a key, or the next one that is free, and knows its own as we do.
    """
    try:
        directory = data_dir.stat()
    except OSError:  # a server that ends has removed it
        return
    for key in range(directory.st_ino, directory.st_ino + _KEYS_TRIED):
        identifier = _libc.shmget(ctypes.c_int32(key), 0, 0)
        status = _status(identifier) if identifier >= 0 else None
        # Postgres runs for nobody but the directory's owner.
        if status is not None and status.owner == directory.st_uid and _names(identifier, status, directory):
            yield identifier


def _names(identifier: int, status: _LinuxStatus | _DarwinStatus, directory: os.stat_result) -> bool:
    """Tell whether what is in a segment says that a server of this directory made it.

    The kernel has to agree on who that was: so we do not take its status for something that it is not.
    """
    if status.size < _HEADER.size + _HEADER_END.size:
        return False
    address = _libc.shmat(identifier, None, _SHM_RDONLY)
    if address == _FAILED:
        return False
    try:
        begin = _HEADER.unpack(ctypes.string_at(address, _HEADER.size))
        end = _HEADER_END.unpack(ctypes.string_at(address + status.size - _HEADER_END.size, _HEADER_END.size))
    finally:
        _libc.shmdt(address)
    return (begin, end) == ((_POSTGRES, status.creator), (directory.st_dev, directory.st_ino))


def _remove_segment(identifier: int, deadline: float) -> None:
    """Remove a segment as soon as nobody is attached to it, or leave it at the deadline."""
    while (status := _status(identifier)) is not None:
        if not status.attached:
            _libc.shmctl(identifier, _IPC_RMID, None)
            return
        if time.monotonic() > deadline:
            _log.warning("shared memory segment %d is left: a process still uses it", identifier)
            return
        time.sleep(_POLL_S)
