"""What a local cluster holds on this machine: its directories and its TCP ports.

The data directory may be kept; the run directory holds sockets, the control socket, copied programs and, without
`--data-dir`, the data itself. Directories and ports are locked by `flock`, which ends with the process: so a later
start can clear up after a SIGKILL.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import secrets
import shutil
import socket
import struct
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

from rocket.cluster.errors import ClusterInUse, DirectoryUnusable, NotOurDirectory, PortInUse
from rocket.cluster.process import DETACH_TIMEOUT_S, end_server_processes, remove_shared_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rocket.cluster.process import Account

_PREFIX = f"rocket-{os.getuid()}-"
_DESCRIPTION = "run.json"
_MARKER = "rocket.json"
_FORMAT = 1
_SOCKET_PATH_LIMIT = 103
"""Bytes that fit into `sockaddr_un`: 107 on Linux, 103 on macOS."""
_LARGEST_PORT = 65535
_FREE_PORTS = range(20000, 32000)
"""Below the ports that the kernel takes for outgoing connections: a server that is down finds its port again."""
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
"""Linux' `FS_IOC_GETFLAGS` and `FS_IOC_SETFLAGS`, as most machines have them; the others know neither number."""
_TOP_OF_HIERARCHIES = 0x00020000
"""The attribute `T` of chattr(1): directories made in this one have nothing to do with each other."""


@dataclass(frozen=True, slots=True)
class RunDescription:
    """What other programs may know of a running cluster."""

    pid: int
    data_dir: str
    temporary: bool
    ports: dict[str, int]
    """The port of each node, by name."""
    database: str


class RunDirectory:
    """A run's own directory below the system's temporary one: private, locked, and removed at the end."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, account: Account | None) -> Self:
        """Make the directory; `account` may pass through it to the directories it owns, others see nothing."""
        path, lock = _locked_directory()
        if account is not None:
            path.chmod(0o711)
        run = cls(path, lock)
        for directory in (run.sockets, run.scratch):
            directory.mkdir(mode=0o700)
            if account is not None:
                account.own(directory)
        return run

    @property
    def sockets(self) -> Path:
        """The directory of the servers' unix sockets."""
        return self.path / "s"

    @property
    def scratch(self) -> Path:
        """A directory of the servers' account, for temporary data and copied programs."""
        return self.path / "tmp"

    @property
    def control_socket(self) -> Path:
        """The path of the control socket."""
        return control_socket(self.path)

    def describe(self, description: RunDescription) -> None:
        """Publish what runs here, atomically."""
        draft = self.path / f"{_DESCRIPTION}.new"
        draft.write_text(json.dumps(asdict(description)))
        draft.rename(self.path / _DESCRIPTION)

    def data_dir(self) -> Path:
        """Return a path for temporary data, placed far from other files where the file system takes a hint.

        An ext4 without a journal, as small virtual machines have it, looks for each new file at every one that was
        deleted nearby within the last minutes. Five replicas beside a cluster that had just been removed were up
        after 1.5 s with the hint and 3.8 s without it (medians of 9 pairs).
        """
        _place_apart(self.scratch)
        return self.scratch / f"data-{secrets.token_hex(4)}"  # the name decides on the place

    def remove(self) -> None:
        """Remove the directory with everything in it, and the lock last."""
        remove_with_shared_memory(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Give up the lock: the directory is then that of a dead run."""
        os.close(self._lock)


def control_socket(run_dir: Path) -> Path:
    """Return the path of the control socket of a run."""
    return run_dir / "control"


def running() -> Iterator[tuple[Path, RunDescription]]:
    """Yield run directory and description of each of this user's running clusters."""
    for path in _run_directories():
        if (lock := _lock_of_dead_run(path)) is not None:
            os.close(lock)
        elif (description := _read_description(path)) is not None:
            yield path, description


def clear_up_dead_runs() -> list[str]:
    """End the servers and remove the directories of runs whose program is gone; return what was done."""
    done = []
    for path in _run_directories():
        lock = _lock_of_dead_run(path)
        if lock is None:
            continue
        description = _read_description(path)
        ended = []
        if description is not None and not _is_claimed(Path(description.data_dir)):
            for name in description.ports:
                ended += end_server_processes(Path(description.data_dir) / name / "data")
        remove_with_shared_memory(path, ignore_errors=True)
        os.close(lock)
        if description is not None:
            left = f"ended its servers {ended}, " if ended else ""
            done.append(f"the run of process {description.pid} was cut off: {left}removed {path}")
    _remove_dead_reservations()
    return done


class DataDirectory:
    """The directory of a cluster's data: kept from run to run, and never one that rocket did not make."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def claim(cls, path: Path, account: Account | None) -> Self:
        """Lock a directory for this run; make it if it does not exist.

        Raise `NotOurDirectory` if it holds something else, `ClusterInUse` if another process runs it, and
        `DirectoryUnusable` if it cannot be made or written.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_what_is_not_ours(path)
            marker = path / _MARKER
            lock = os.open(marker, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                _lock_or_name_holder(lock, path)
                if account is not None:
                    account.own(path)
                marker_text = json.dumps({"rocket_cluster_format": _FORMAT, "pid": os.getpid()}).encode()
                # In this order the marker is never empty, which would mark the directory as not ours.
                os.pwrite(lock, marker_text, 0)
                os.truncate(lock, len(marker_text))
            except BaseException:
                os.close(lock)
                raise
        except OSError as error:
            raise DirectoryUnusable(f"cannot use {path} as data directory: {error.strerror}") from None
        return cls(path, lock)

    @property
    def password_file(self) -> Path:
        """The superuser's random password, in libpq's own format (`PGPASSFILE`)."""
        return self.path / "pgpass"

    def release(self) -> None:
        """Give up the lock."""
        os.close(self._lock)


def _is_claimed(path: Path) -> bool:
    """Return whether a live run has claimed a data directory, also one that a dead run had before."""
    try:
        lock = os.open(path / _MARKER, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _refuse_what_is_not_ours(path: Path) -> None:
    others = [entry for entry in path.iterdir() if entry.name != _MARKER]
    try:
        marker = json.loads((path / _MARKER).read_text())
        ours = isinstance(marker, dict) and marker.get("rocket_cluster_format") == _FORMAT
    except (FileNotFoundError, ValueError):
        ours = False
    if others and not ours:
        raise NotOurDirectory(f"{path} holds something that rocket did not make; it was left as it is")


def _locked_directory() -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_temporary_root()))
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        # A program that clears up may have locked it first, taken this run for dead and removed it.
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (path / "lock").exists():
                return path, lock
        os.close(lock)


def _lock_or_name_holder(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            holder = json.loads(os.pread(lock, 1000, 0))["pid"]
            raise ClusterInUse(f"{path} is in use by the rocket of process {holder}") from None
        raise ClusterInUse(f"{path} is in use by another rocket") from None


def _temporary_root() -> Path:
    longest = f"{_PREFIX}xxxxxxxx/s/.s.PGSQL.65535.lock"
    for root in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - mkdtemp makes a private directory in it
        # Postgres and libpq take a comma for the end of a directory, and a line feed ends everything.
        if len(os.fsencode(f"{root}/{longest}")) <= _SOCKET_PATH_LIMIT and not set(root) & set(",\n"):
            return Path(root)
    raise DirectoryUnusable("no temporary directory has a path that is fit for a unix socket")


def _run_directories() -> Iterator[Path]:
    for root in {Path(tempfile.gettempdir()), _temporary_root()}:
        for path in root.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                # Only our own: any user may put a directory of this name into a shared directory.
                if path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.getuid():
                    yield path


def _lock_of_dead_run(path: Path) -> int | None:
    """Lock the directory of a run and return the lock, or None if its program is alive."""
    try:
        lock = os.open(path / "lock", os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _read_description(path: Path) -> RunDescription | None:
    try:
        return RunDescription(**json.loads((path / _DESCRIPTION).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def remove_with_shared_memory(directory: Path, *, ignore_errors: bool = False) -> None:
    """Remove a directory, and the shared memory that killed servers of data directories in it have left.

    Raise `OSError` where the directory cannot be removed, unless errors are ignored.
    """
    deadline = time.monotonic() + DETACH_TIMEOUT_S
    for path, directories, files in os.walk(directory):
        if "postmaster.pid" in files:
            remove_shared_memory(Path(path), max(0.0, deadline - time.monotonic()))
            directories.clear()  # data directories are not nested
    shutil.rmtree(directory, ignore_errors=ignore_errors)


def _place_apart(parent: Path) -> None:
    """Ask the file system to place each directory in `parent` by itself; it may not know how."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            directory = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                (flags,) = struct.unpack("q", fcntl.ioctl(directory, _GET_FLAGS, bytes(8)))
                fcntl.ioctl(directory, _SET_FLAGS, struct.pack("q", flags | _TOP_OF_HIERARCHIES))
            finally:
                os.close(directory)


# --- ports ---


class PortReservations:
    """TCP ports of 127.0.0.1 that no other rocket of this user takes until they are released.

    Each is a locked file, as in Postgres' `Cluster.pm` and pgbouncer's tests. The lock holds from the choice of a
    port past the moment at which the server binds it, and while that server is down; a check that the port can be
    bound covers all other programs.
    """

    def __init__(self, free_ports: Sequence[int] = _FREE_PORTS) -> None:
        self._free_ports = free_ports
        self._locks: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def reserve_any(self) -> int:
        """Reserve a port that is free now and return it; raise `PortInUse` if there is none."""
        for port in random.sample(self._free_ports, len(self._free_ports)):
            if self._try(port):
                return port
        raise PortInUse(f"no port from {min(self._free_ports)} to {max(self._free_ports)} is free")

    def reserve(self, port: int) -> None:
        """Reserve this port; raise `PortInUse`, which names its holder as far as this user may know."""
        if port > _LARGEST_PORT:
            raise PortInUse(f"port {port} is asked for, and {_LARGEST_PORT} is the largest")
        if not self._try(port):
            raise PortInUse(f"port {port} is in use{port_holder(port)}: try --postgres-port 0")

    def release(self) -> None:
        """Give all ports back."""
        while self._locks:
            port, lock = self._locks.popitem()
            _unlock_and_remove(_reservation(port), lock)

    def _try(self, port: int) -> bool:
        if port in self._locks or (lock := _try_lock(_reservation(port))) is None:
            return False
        if not port_is_free(port):
            _unlock_and_remove(_reservation(port), lock)
            return False
        self._locks[port] = lock
        return True


def port_is_free(port: int) -> bool:
    """Return whether a server could listen on 127.0.0.1 at this port now."""
    with socket.socket() as probe:
        # As Postgres does: connections of a server that is gone do not hold its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


def port_holder(port: int) -> str:
    """Return who has a port, as far as this user may know: text to follow "is in use"."""
    for _, description in running():
        if port in description.ports.values():
            return f" by the rocket of process {description.pid} ({description.data_dir})"
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def _reservation(port: int) -> Path:
    return _reservations() / str(port)


def _reservations() -> Path:
    # Not `tempfile.gettempdir()`: programs with other temporary directories share the ports.
    return Path("/tmp") / f"rocket-ports-{os.getuid()}"  # noqa: S108 - private, and its owner is checked


def _try_lock(path: Path) -> int | None:
    """Lock a file, making it and its private directory; None if another holds the lock."""
    while True:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.parent.is_symlink() or path.parent.stat().st_uid != os.getuid():
                raise DirectoryUnusable(f"{path.parent} belongs to another user")
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # another program has removed the directory since
            continue
        except OSError as error:
            raise DirectoryUnusable(f"cannot reserve a port in {path.parent}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(lock).st_ino:
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError:
            pass
        os.close(lock)  # its holder has removed it: another program may lock the next file of that name


def _unlock_and_remove(path: Path, lock: int) -> None:
    path.unlink(missing_ok=True)  # while it is locked, so that it is the locked one
    os.close(lock)
    with contextlib.suppress(OSError):  # others have reservations
        path.parent.rmdir()


def _remove_dead_reservations() -> None:
    with contextlib.suppress(FileNotFoundError):
        for path in list(_reservations().iterdir()):
            if (lock := _try_lock(path)) is not None:
                _unlock_and_remove(path, lock)
