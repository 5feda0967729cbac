"""A node's directory: how its data is made, copied, configured, and turned back into a replica's."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, NamedTuple

from rocket.cluster.binaries import SUPERUSER
from rocket.cluster.directories import remove_with_shared_memory
from rocket.cluster.process import DETACH_TIMEOUT_S, remove_shared_memory, run_command

if TYPE_CHECKING:
    from pathlib import Path

    from rocket.cluster.binaries import Installation
    from rocket.cluster.timelines import ControlFile, Lineage

CONFIGURATION = "rocket.conf"
"""Lies in the data directory, is included by postgresql.conf, and is written anew before each start."""

_INITDB_TIMEOUT_S = 60.0  # a slow disk
_CLONE_TIMEOUT_S = 300.0  # a kept directory may be large
_REWIND_TIMEOUT_S = 120.0  # recovery of a killed primary is part of it
_SEGMENT = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})")
_HISTORY = re.compile(r"([0-9A-F]{8})\.history")
_LOG_TAIL_LINES = 12
_BLANK_BYTES = 1024 * 1024
_INITDB_TAKES_SETTINGS = 16  # the first major version that does


class NodeDirectory:
    """The directory of one node: Postgres' data directory, and the server's log beside it."""

    def __init__(self, home: Path, installation: Installation) -> None:
        self.home = home
        self.data = home / "data"
        self.log = home / "server.log"
        self.half_rewound = home / "half-mended"
        """Exists while the data directory is rewound: what it then says of itself cannot be trusted."""
        self.installation = installation

    @property
    def exists(self) -> bool:
        """Whether the data directory has been made."""
        return self.data.is_dir()

    @property
    def is_replica(self) -> bool:
        """Whether it is marked as a replica's: its server follows another one."""
        return (self.data / "standby.signal").exists()

    @property
    def log_size(self) -> int:
        """The bytes in the server's log; 0 where there is none."""
        return self.log.stat().st_size if self.log.exists() else 0

    def log_lines(self, start: int) -> list[str]:
        """Return the last lines of the server's log behind a position."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return ["(no log)"]

    def log_tail(self, start: int) -> str:
        """Return the same as text, indented."""
        return "\n".join(f"    {line}" for line in self.log_lines(start))

    async def clear_after_kill(self) -> None:
        """Remove the shared memory of a server that was killed; its processes must be gone or going.

        The next start would remove it, but not if it fails early: then its lock file, which names it, is gone.
        """
        if (self.data / "postmaster.pid").exists():
            await asyncio.to_thread(remove_shared_memory, self.data, DETACH_TIMEOUT_S)

    async def init(self, password_file: Path, wal_segment_mib: int) -> None:
        """Make a new database cluster, with a system identifier of its own."""
        fresh = await self._make_fresh()
        binaries = self.installation.binaries
        await run_command(
            binaries.program("initdb"),
            f"--pgdata={fresh}",
            f"--username={SUPERUSER}",
            f"--pwfile={password_file}",
            "--auth-local=trust",  # only our own account can enter the 0700 socket directory
            "--auth-host=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
            f"--wal-segsize={wal_segment_mib}",
            "--no-sync",  # the kernel writes it out in its own time, as it does with clones
            # It runs servers itself, which do not read rocket.conf yet.
            *([f"--set={_MMAP.name}={_MMAP.value}"] if binaries.major >= _INITDB_TAKES_SETTINGS else []),
            account=self.installation.account,
            timeout_s=_INITDB_TIMEOUT_S,
        )
        with (fresh / "postgresql.conf").open("a") as file:
            file.write(f"\ninclude '{CONFIGURATION}'\n")
        fresh.rename(self.data)

    async def clone(self, source: NodeDirectory) -> None:
        """Copy the directory of a *stopped* node, as a replica of it.

        Far cheaper than a base backup of a running server (design fact F7).
        """
        fresh = await self._make_fresh()
        await run_command(
            "cp", "-a", f"{source.data}/.", fresh,
            account=self.installation.account, timeout_s=_CLONE_TIMEOUT_S,
        )  # fmt: skip
        (fresh / "postmaster.pid").unlink(missing_ok=True)  # of a source that was killed
        self._mark_standby(fresh)
        fresh.rename(self.data)

    async def back_up(self, source_port: int) -> None:
        """Replace the data of this stopped node by a base backup of a *running* one.

        Raise `CommandFailed` if that fails: the old data is then as it was.
        """
        fresh = await self._make_fresh()
        await run_command(
            self.installation.binaries.program("pg_basebackup"),
            f"--pgdata={fresh}",
            f"--host={self.installation.socket_dir}",
            f"--port={source_port}",
            f"--username={SUPERUSER}",
            "--checkpoint=fast",
            "--wal-method=stream",
            "--no-sync",
            account=self.installation.account,
            timeout_s=_CLONE_TIMEOUT_S,
        )
        self._mark_standby(fresh)
        # What ALTER SYSTEM has set on the source may be for a moment only.
        (fresh / "postgresql.auto.conf").write_bytes(b"")
        # A program that dies here leaves the old directory, none, or the new one, never half of one.
        old = await self._free_name_for_old()
        if self.exists:
            self.data.rename(old)
        fresh.rename(self.data)
        self.half_rewound.unlink(missing_ok=True)
        await asyncio.to_thread(remove_with_shared_memory, old, ignore_errors=True)  # the next copy tries again

    async def rewind(self, source_port: int) -> None:
        """Turn the data of this stopped node back to where its history left that of a running one.

        Raise `CommandFailed` if that fails: the directory is then of no use, and marked so.
        """
        await self.clear_after_kill()  # pg_rewind begins with a start
        # If this program dies on the way, the directory is neither a primary's nor a replica's.
        self.half_rewound.touch()
        host = str(self.installation.socket_dir).replace("\\", "\\\\").replace("'", "\\'")
        await run_command(
            self.installation.binaries.program("pg_rewind"),
            f"--target-pgdata={self.data}",
            f"--source-server=host='{host}' port={source_port} user={SUPERUSER} dbname=postgres",
            "--no-sync",
            account=self.installation.account,
            timeout_s=_REWIND_TIMEOUT_S,
        )
        self.become_standby()
        self.half_rewound.unlink()

    def trim(self, lineage: Lineage, control: ControlFile) -> None:
        """Remove WAL that does not belong to a history from the directory of a stopped node.

        The part of an ancestor's files behind the fork goes, and files of other timelines altogether. So do those
        of timelines that no page knows of: Postgres prefers the newest timeline's file of a segment, and fails
        where a crash left that incomplete. Trimming suffices only where no page holds anything of that WAL.
        """
        for path in (self.data / "pg_wal").iterdir():
            if (match := _SEGMENT.fullmatch(path.name)) is not None:
                timeline, high, low = (int(part, 16) for part in match.groups())
                begin = (high << 32) + low * control.segment_bytes
                fork = lineage.forks.get(timeline, 0)
                if timeline > control.timeline:
                    path.unlink()
                elif timeline == lineage.timeline:
                    continue
                elif fork <= begin:
                    path.unlink()
                elif fork < begin + control.segment_bytes:
                    _blank(path, fork - begin)
            elif (match := _HISTORY.fullmatch(path.name)) is not None:
                timeline = int(match[1], 16)
                if timeline != lineage.timeline and timeline not in lineage.forks:
                    path.unlink()

    def become_standby(self) -> None:
        """Mark the directory as a replica's."""
        self._mark_standby(self.data)

    def configure(self, *, name: str, port: int, upstream_port: int | None, apply_delay_ms: int) -> None:
        """Write the server's configuration file; a running server reads it at a reload."""
        draft = self.data / f"{CONFIGURATION}.new"  # a reload sees the whole new file or the old one
        draft.write_text(
            server_configuration(
                name=name,
                major=self.installation.binaries.major,
                port=port,
                socket_dir=self.installation.socket_dir,
                upstream_port=upstream_port,
                apply_delay_ms=apply_delay_ms,
            )
        )
        self.installation.own(draft)
        draft.rename(self.data / CONFIGURATION)

    def _mark_standby(self, data_dir: Path) -> None:
        path = data_dir / "standby.signal"
        path.touch(mode=0o600)
        self.installation.own(path)

    async def _make_fresh(self) -> Path:
        """Return an empty directory, which is renamed to the data directory only when it is complete."""
        self._make(self.home)
        await self._free_name_for_old()
        fresh = self.home / "data.new"
        if fresh.exists():  # left by a start that was interrupted
            await asyncio.to_thread(remove_with_shared_memory, fresh)
        self._make(fresh)
        return fresh

    async def _free_name_for_old(self) -> Path:
        """Return a free name for a directory that is no longer needed."""
        old = self.home / "data.old"
        if old.exists():  # left by a copy that was interrupted
            await asyncio.to_thread(remove_with_shared_memory, old)
        return old

    def _make(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self.installation.own(directory)


def _blank(path: Path, begin: int) -> None:
    """Overwrite the end of a file with zeros, which Postgres takes for the end of WAL."""
    with path.open("r+b") as file:
        left = file.seek(0, 2) - begin
        file.seek(begin)
        while left > 0:
            left -= file.write(bytes(min(left, _BLANK_BYTES)))


# --- the configuration of each server, and why ---


class Setting(NamedTuple):
    """One line of a configuration file."""

    name: str
    value: str | int
    why: str
    since: int = 0
    """The first major version that has the setting."""


_MMAP = Setting(
    "dynamic_shared_memory_type", "mmap", "a killed server's segments are files, removed with its directory"
)

_SHARED = (
    Setting("listen_addresses", "127.0.0.1", "nothing listens beyond this machine"),
    Setting("unix_socket_permissions", "0700", "only the account that made the cluster connects by socket"),
    Setting("wal_log_hints", "on", "lets pg_rewind turn an old primary into a replica"),
    Setting("wal_keep_size", "256MB", "a replica that was away for a while can follow again; bounded"),
    Setting("max_wal_size", "256MB", "a bounded directory"),
    Setting("max_wal_senders", 32, "replicas, and their replacements while they are cloned"),
    Setting("max_connections", 200, "the same on every node, as hot standby demands"),
    Setting("shared_buffers", "32MB", "six servers on one small machine"),
    _MMAP,
    Setting("wal_retrieve_retry_interval", "100ms", "a replica finds a restarted primary at once"),
    Setting("wal_receiver_status_interval", "1s", "the primary knows where its replicas are"),
    Setting("wal_receiver_timeout", "5s", "a silent primary is noticed"),
    Setting("wal_sender_timeout", "5s", "a silent replica is noticed"),
    Setting("io_method", "sync", "no I/O worker processes beside each of six small servers", since=18),
    Setting("log_checkpoints", "off", "server.log is for what needs a reader"),
    Setting("log_line_prefix", "%m [%p] ", "time and process"),
    Setting("timezone", "UTC", "one clock for all logs"),
    Setting("log_timezone", "UTC", "one clock for all logs"),
)


def server_configuration(
    *,
    name: str,
    major: int,
    port: int,
    socket_dir: Path,
    upstream_port: int | None,
    apply_delay_ms: int,
) -> str:
    """Return the text of one server's configuration file; without an `upstream_port`, it follows no server."""
    conninfo = {
        "host": str(socket_dir),
        "port": str(upstream_port),
        "user": SUPERUSER,
        "application_name": name,
    }
    upstream = " ".join(f"{key}={_quoted_for_libpq(value)}" for key, value in conninfo.items() if upstream_port)
    own = (
        Setting("cluster_name", name, "shown by ps"),
        Setting("port", port, "also the name of the socket"),
        Setting("unix_socket_directories", str(socket_dir), "a 0700 directory of this run's own"),
        Setting("primary_conninfo", upstream, "the server to follow; without effect on a primary"),
        Setting("recovery_min_apply_delay", f"{apply_delay_ms}ms", "lag on demand; without effect on a primary"),
    )
    lines = ["# Written by rocket at every start: changes made here are lost."]
    for setting in (*_SHARED, *own):
        if major >= setting.since:
            lines += [f"# {setting.why}", f"{setting.name} = {_quoted(str(setting.value))}"]
    return "\n".join([*lines, ""])


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _quoted_for_libpq(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
