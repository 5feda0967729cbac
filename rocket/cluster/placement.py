"""Where the file system puts a new directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
"""Linux' `FS_IOC_GETFLAGS` and `FS_IOC_SETFLAGS`, as most machines have them; the others know neither number."""
_TOP_OF_HIERARCHIES = 0x00020000
"""The attribute `T` of chattr(1): directories made in this one have nothing to do with each other."""


def apart(parent: Path) -> Path:
    """Return a name in `parent` for a directory whose files shall lie far from all others.

    An ext4 without a journal, as small virtual machines have it, looks for each new file at every one that was
    deleted nearby within the last minutes: five clones took 2 to 5 s beside a cluster that had just been
    removed, and 0.15 s elsewhere on the disk. A hint; other file systems do as they like.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            directory = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                (flags,) = struct.unpack("q", fcntl.ioctl(directory, _GET_FLAGS, bytes(8)))
                fcntl.ioctl(directory, _SET_FLAGS, struct.pack("q", flags | _TOP_OF_HIERARCHIES))
            finally:
                os.close(directory)
    return parent / f"data-{secrets.token_hex(4)}"  # which decides where, in such a parent
