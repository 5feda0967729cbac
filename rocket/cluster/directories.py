"""The directories of a local cluster: one for its data, one for what lives only as long as the run.

The run directory holds sockets, the control socket, copied programs and, without `--data-dir`, the data itself.
A lock that dies with its process tells the living from the dead, so that a later start can clear up after a
SIGKILL.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

from rocket.cluster.errors import ClusterInUse, DirectoryUnusable, NotOurDirectory
from rocket.cluster.process import end_server_processes
from rocket.cluster.removal import remove_for_good

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rocket.cluster.account import Account

_PREFIX = f"rocket-{os.getuid()}-"
_DESCRIPTION = "run.json"
_MARKER = "rocket.json"
_FORMAT = 1
_SOCKET_PATH_LIMIT = 103
"""Bytes that fit into `sockaddr_un`: 107 on Linux, 103 on macOS."""


@dataclass(frozen=True, slots=True)
class RunDescription:
    """What others may know of a running cluster."""

    pid: int
    data_dir: str
    temporary: bool
    ports: dict[str, int]
    """The port of each node, by name."""
    database: str


class RunDirectory:
    """A run's own directory below the system's temporary one: made private, locked, and removed at the end."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, account: Account | None) -> Self:
        """Make the directory; `account` may pass through it to the directories it owns, others may not look."""
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
        """Where the servers' unix sockets are: the first of the two doors."""
        return self.path / "s"

    @property
    def scratch(self) -> Path:
        """The servers' account owns it; for temporary data and copied programs."""
        return self.path / "tmp"

    @property
    def control_socket(self) -> Path:
        """Where the supervisor listens."""
        return control_socket(self.path)

    def describe(self, description: RunDescription) -> None:
        """Tell others, whole or not at all, what runs here."""
        draft = self.path / f"{_DESCRIPTION}.new"
        draft.write_text(json.dumps(asdict(description)))
        draft.rename(self.path / _DESCRIPTION)

    def remove(self) -> None:
        """Remove the directory with all that is in it, and the lock last."""
        remove_for_good(self.path, ignore_errors=True)
        os.close(self._lock)


def control_socket(run_dir: Path) -> Path:
    """Return the path of the control socket of a run."""
    return run_dir / "control"


def running() -> Iterator[tuple[Path, RunDescription]]:
    """Find this user's running clusters: run directory and description of each."""
    for path in _run_directories():
        if (lock := _lock_of_the_dead(path)) is not None:
            os.close(lock)
        elif (description := _read_description(path)) is not None:
            yield path, description


def clear_up_after_the_dead() -> list[str]:
    """End the servers and remove the directories of runs whose program is gone; say what was done."""
    done = []
    for path in _run_directories():
        lock = _lock_of_the_dead(path)
        if lock is None:
            continue
        description = _read_description(path)
        ended = []
        if description is not None and not _is_claimed(Path(description.data_dir)):
            for name in description.ports:
                ended += end_server_processes(Path(description.data_dir) / name / "data")
        remove_for_good(path, ignore_errors=True)
        os.close(lock)
        if description is not None:
            left = f"ended its servers {ended}, " if ended else ""
            done.append(f"the run of process {description.pid} was cut off: {left}removed {path}")
    return done


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now and that no other running cluster has named.

    Chosen outside the range from which the kernel takes ports for outgoing connections, so that a server that
    is down for a moment finds its port again.
    """
    taken = {port for _, description in running() for port in description.ports.values()}
    while True:
        port = 20000 + secrets.randbelow(12000)
        if port not in taken and port_is_free(port):
            return port


def port_is_free(port: int) -> bool:
    """Tell whether a server could listen on 127.0.0.1 at this port now."""
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
    """Say, as far as this user may know, who has a port: text to go behind "is in use"."""
    for _, description in running():
        if port in description.ports.values():
            return f" by the rocket of process {description.pid} ({description.data_dir})"
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


class DataDirectory:
    """Where a cluster's data is: kept from run to run, and only ever one that rocket made."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def claim(cls, path: Path, account: Account | None) -> Self:
        """Take a directory for this run, making it if it is not there.

        Raise `NotOurDirectory` if it holds something else, `ClusterInUse` if another process runs it, and
        `DirectoryUnusable` if it cannot be made or written.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_what_is_not_ours(path)
            marker = path / _MARKER
            lock = os.open(marker, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                _lock_or_say_who(lock, path)
                if account is not None:
                    account.own(path)
                marker_text = json.dumps({"rocket_cluster_format": _FORMAT, "pid": os.getpid()}).encode()
                # In this order the marker never is empty, which would make the directory nobody's.
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
        """Let others run it."""
        os.close(self._lock)


def _is_claimed(path: Path) -> bool:
    """Tell whether a live run has claimed a data directory, also one that a dead run had before."""
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
        said = json.loads((path / _MARKER).read_text())
        ours = isinstance(said, dict) and said.get("rocket_cluster_format") == _FORMAT
    except (FileNotFoundError, ValueError):
        ours = False
    if others and not ours:
        raise NotOurDirectory(f"{path} holds something that rocket did not make; it was left as it is")


def _locked_directory() -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_temporary_root()))
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        # Someone who clears up may have been faster, have taken us for dead and removed it all.
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (path / "lock").exists():
                return path, lock
        os.close(lock)


def _lock_or_say_who(lock: int, path: Path) -> None:
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
                # Only what is ours: anyone may put such a name into a shared directory.
                if path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.getuid():
                    yield path


def _lock_of_the_dead(path: Path) -> int | None:
    """Return a run's lock, taken, if its program is gone."""
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
