"""How a node's data directory is made, copied, and turned back into a replica's."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from rocket.cluster.configuration import FILE_NAME, SHARED_MEMORY_IN_FILES
from rocket.cluster.installation import SUPERUSER
from rocket.cluster.process import run_command
from rocket.cluster.removal import remove_for_good

if TYPE_CHECKING:
    from pathlib import Path

    from rocket.cluster.control_file import ControlFile
    from rocket.cluster.node import Node
    from rocket.cluster.timelines import Lineage

SEGMENT_MIB = 4
"""Of a new cluster's WAL. Each clone copies a whole segment, nearly empty; a quarter of Postgres' own 16."""

_INITDB_TIMEOUT_S = 60.0
_CLONE_TIMEOUT_S = 300.0  # a kept directory may be large
_REWIND_TIMEOUT_S = 120.0  # recovery of a killed primary is part of it
_SEGMENT = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})")
_HISTORY = re.compile(r"([0-9A-F]{8})\.history")
_PIECE = 1024 * 1024
_INITDB_TAKES_SETTINGS = 16  # the first major version that does


async def init(node: Node, password_file: Path) -> None:
    """Make a new database cluster in its directory: one with a system identifier of its own."""
    fresh = await _fresh_dir(node)
    binaries, memory = node.installation.binaries, SHARED_MEMORY_IN_FILES
    await run_command(
        binaries.program("initdb"),
        f"--pgdata={fresh}",
        f"--username={SUPERUSER}",
        f"--pwfile={password_file}",
        "--auth-local=trust",  # whoever gets into the 0700 socket directory is us
        "--auth-host=scram-sha-256",
        "--encoding=UTF8",
        "--locale=C",
        f"--wal-segsize={SEGMENT_MIB}",
        "--no-sync",  # the kernel writes it out in its own time, as it does with clones
        # It runs servers itself, which know none of our settings yet.
        *([f"--set={memory.name}={memory.value}"] if binaries.major >= _INITDB_TAKES_SETTINGS else []),
        account=node.installation.account,
        timeout_s=_INITDB_TIMEOUT_S,
    )
    with (fresh / "postgresql.conf").open("a") as file:
        file.write(f"\ninclude '{FILE_NAME}'\n")
    fresh.rename(node.data_dir)


async def clone(node: Node, source: Node) -> None:
    """Make its directory a copy of a *stopped* node's, as a replica of it.

    Far cheaper than a base backup of a running server (design fact F7).
    """
    fresh = await _fresh_dir(node)
    await run_command(
        "cp", "-a", f"{source.data_dir}/.", fresh,
        account=node.installation.account, timeout_s=_CLONE_TIMEOUT_S,
    )  # fmt: skip
    (fresh / "postmaster.pid").unlink(missing_ok=True)  # of a source that was killed
    _signal_standby(node, fresh)
    fresh.rename(node.data_dir)


async def back_up(node: Node, source: Node) -> None:
    """Make its directory anew as a base backup of a *running* node; it must be stopped itself.

    Raise `CommandFailed` if that fails: the old directory is then as it was.
    """
    fresh = await _fresh_dir(node)
    await run_command(
        node.installation.binaries.program("pg_basebackup"),
        f"--pgdata={fresh}",
        f"--host={node.installation.socket_dir}",
        f"--port={source.port}",
        f"--username={SUPERUSER}",
        "--checkpoint=fast",
        "--wal-method=stream",
        "--no-sync",
        account=node.installation.account,
        timeout_s=_CLONE_TIMEOUT_S,
    )
    _signal_standby(node, fresh)
    # Whoever dies here leaves the old directory, none, or the new one: never half of one.
    old = await _out_of_the_way(node)
    if node.exists:
        node.data_dir.rename(old)
    fresh.rename(node.data_dir)
    node.half_mended.unlink(missing_ok=True)
    await asyncio.to_thread(remove_for_good, old, ignore_errors=True)  # the next copy tries it again


async def rewind(node: Node, source: Node) -> None:
    """Turn the directory of a stopped node back to where its history left that of a running one.

    Raise `CommandFailed` if that fails: the directory is then good for nothing, and marked so.
    """
    # A program that dies on the way leaves neither a primary's directory nor a replica's.
    node.half_mended.touch()
    host, port = str(node.installation.socket_dir).replace("\\", "\\\\").replace("'", "\\'"), source.port
    await run_command(
        node.installation.binaries.program("pg_rewind"),
        f"--target-pgdata={node.data_dir}",
        f"--source-server=host='{host}' port={port} user={SUPERUSER} dbname=postgres",
        "--no-sync",
        account=node.installation.account,
        timeout_s=_REWIND_TIMEOUT_S,
    )
    become_standby(node)
    node.half_mended.unlink()


def trim(node: Node, lineage: Lineage, control: ControlFile) -> None:
    """Take out of a stopped node's directory the WAL that is not of a history, as if it had never been received.

    Of an ancestor's files the part behind the fork goes, and files of other timelines altogether. So do those of
    timelines that no page knows of: Postgres prefers the newest one's file of a segment, and stumbles where a
    crash left that incomplete. It is enough only where no page holds anything of that WAL.
    """
    for path in (node.data_dir / "pg_wal").iterdir():
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


def become_standby(node: Node) -> None:
    """Let its directory say that it follows another node."""
    _signal_standby(node, node.data_dir)


def _signal_standby(node: Node, data_dir: Path) -> None:
    path = data_dir / "standby.signal"
    path.touch(mode=0o600)
    node.installation.own(path)


def _blank(path: Path, begin: int) -> None:
    """Overwrite the end of a file with zeros, which is where Postgres takes WAL to end."""
    with path.open("r+b") as file:
        left = file.seek(0, 2) - begin
        file.seek(begin)
        while left > 0:
            left -= file.write(bytes(min(left, _PIECE)))


async def _fresh_dir(node: Node) -> Path:
    """Return an empty directory that becomes the data directory only when it is complete."""
    _make_dir(node, node.home)
    await _out_of_the_way(node)
    fresh = node.home / "data.new"
    if fresh.exists():  # a start that was cut off
        await asyncio.to_thread(remove_for_good, fresh)
    _make_dir(node, fresh)
    return fresh


async def _out_of_the_way(node: Node) -> Path:
    """Return a name, not taken, for a directory that is no longer needed."""
    old = node.home / "data.old"
    if old.exists():  # of somebody who was cut off
        await asyncio.to_thread(remove_for_good, old)
    return old


def _make_dir(node: Node, directory: Path) -> None:
    directory.mkdir(mode=0o700, exist_ok=True)
    node.installation.own(directory)
