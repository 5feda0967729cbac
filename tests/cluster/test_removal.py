"""Servers that were killed leave no shared memory behind once their directory is gone."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import pytest

from rocket.cluster import directories
from rocket.cluster.cluster import ClusterSettings
from rocket.cluster.directories import remove_with_shared_memory
from rocket.cluster.errors import ServerFailedToStart
from rocket.cluster.process import end_server_processes, segments_listed_by_ipcs, server_processes
from rocket.cluster.promotion import promote
from rocket.cluster.supervisor import local_cluster

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

SYSTEM_V = Path("/proc/sysvipc/shm")
IPC_RMID, IPC_CREAT = 0, 0o1000

libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p

pytestmark = pytest.mark.skipif(not SYSTEM_V.exists(), reason="only Linux shows everybody's shared memory")


class Shared(NamedTuple):
    """The shared memory of some servers that outlives a process that is killed."""

    segments: set[str]
    """Key and id of each System V segment."""
    files: set[Path]
    """Of dynamic shared memory, wherever they are."""

    def left(self) -> Shared:
        """Return what of it is still there."""
        there = {segment for segment, _, _ in system_v()}
        return Shared(self.segments & there, {file for file in self.files if file.exists()})


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives directories away")
NOTHING = Shared(set(), set())


def system_v() -> Iterable[tuple[str, int, int]]:
    """Return the key and id of every System V segment, in a text, who made it, and how many are attached to it."""
    for line in SYSTEM_V.read_text().splitlines()[1:]:
        key, identifier, _, _, creator, _, attached = line.split()[:7]
        yield f"{key} {identifier}", int(creator), int(attached)


def segments_in(*data_dirs: Path) -> set[str]:
    """Return the System V segments that the servers of these directories have made, and use."""
    # Dead servers may have had the same process ids.
    ids = {process.pid for data_dir in data_dirs for process in server_processes(data_dir)}
    return {segment for segment, creator, attached in system_v() if attached and creator in ids}


def maps_of(process: psutil.Process) -> Sequence[Any]:
    """Return what a process has mapped: nothing, if it has ended meanwhile, as workers of a server do."""
    try:
        return list(process.memory_maps())
    except psutil.NoSuchProcess:
        return []


def shared_by(*data_dirs: Path) -> Shared:
    """Return what the servers of these directories share now."""
    processes = [process for data_dir in data_dirs for process in server_processes(data_dir)]
    mapped = {Path(each.path) for process in processes for each in maps_of(process)}
    files = {path for path in mapped if path.name.startswith(("PostgreSQL.", "mmap."))}
    shared = Shared(segments_in(*data_dirs), files)
    assert len(data_dirs) == len(shared.segments)
    assert len(data_dirs) <= len(shared.files)
    return shared


def killed(node: Node) -> None:
    """Kill a server's postmaster, as any program might."""
    assert node.pid is not None
    os.kill(node.pid, signal.SIGKILL)


async def test_servers_that_were_killed_leave_no_shared_memory() -> None:
    """One by SIGKILL; and a frozen one, since another was promoted in its place."""
    async with local_cluster(ClusterSettings(replicas=2, port=0)) as cluster:
        shared = shared_by(*(node.data_dir for node in cluster.nodes.values()))
        killed(cluster.node("replica1"))
        cluster.primary.freeze()
        await promote(cluster, "replica0")
        assert 2 <= len(shared.left().segments)  # until those directories are started again
    assert NOTHING == shared.left()


async def test_start_that_fails_after_a_kill_leaves_no_shared_memory(kept_dir: Path) -> None:
    """Postgres removes the lock file that names it, and not the shared memory."""
    async with local_cluster(ClusterSettings(replicas=0, port=0, data_dir=kept_dir / "data")) as cluster:
        node = cluster.primary
        shared = shared_by(node.data_dir)
        killed(node)
        assert node.process is not None
        await node.process.wait()
        control_file = node.data_dir / "global" / "pg_control"
        control_file.write_bytes(bytes(control_file.stat().st_size))
        assert shared.segments == shared.left().segments
        with pytest.raises(ServerFailedToStart):
            await node.start(node.port)
        assert set() == shared.left().segments


async def test_fresh_copy_takes_the_shared_memory_of_the_old_one_away(cluster: LocalCluster) -> None:
    """The cluster goes on meanwhile."""
    node = cluster.node("replica0")
    shared, before = shared_by(node.data_dir), node.process
    node.distrust(unfit=True)
    killed(node)
    async with asyncio.timeout(20):
        while node.process is before:
            await asyncio.sleep(0.01)
        await node.up.wait()
    assert NOTHING == shared.left()
    await cluster.wait_for_catchup()


async def test_start_that_is_cut_off_in_initdb_leaves_no_shared_memory(
    kept_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs servers of its own, which are killed then."""
    monkeypatch.setattr("tempfile.tempdir", str(kept_dir))
    cluster = local_cluster(ClusterSettings(replicas=0, port=0))
    starting = asyncio.create_task(cluster.__aenter__(), name="start")
    shared = NOTHING
    try:
        async with asyncio.timeout(30):
            while not all(shared):
                await asyncio.sleep(0.001)
                files = set(kept_dir.glob("*/tmp/*/primary/data.new/pg_dynshmem/mmap.*"))
                shared = Shared({each for file in files for each in segments_in(file.parent.parent)}, files)
    finally:
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    assert NOTHING == shared.left()


PROGRAM = """
import asyncio
from rocket.cluster.cluster import ClusterSettings
from rocket.cluster.supervisor import local_cluster

async def run():
    async with local_cluster(ClusterSettings(replicas=1, port=0)) as cluster:
        print("up", flush=True)
        await asyncio.Event().wait()

asyncio.run(run())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
async def test_clearing_up_removes_the_shared_memory_of_a_dead_run(
    kept_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program was killed, and a frozen server never got to end in order."""
    monkeypatch.setattr("tempfile.tempdir", str(kept_dir))
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, stdout=asyncio.subprocess.PIPE, env={**os.environ, "TMPDIR": str(kept_dir)}
    )
    assert program.stdout is not None
    homes: list[Path] = []
    try:
        async with asyncio.timeout(30):
            assert b"up\n" == await program.stdout.readline()
        [(_, run)] = directories.running()
        homes += (Path(run.data_dir) / name / "data" for name in run.ports)
        shared = shared_by(*homes)
        for process in server_processes(homes[-1]):
            process.suspend()
        program.kill()
        await program.wait()
        async with asyncio.timeout(10):
            while len(shared.left().segments) > 1:
                await asyncio.sleep(0.02)
        assert 1 == len(await asyncio.to_thread(directories.clear_up_dead_runs))
        assert NOTHING == shared.left()
    finally:
        if program.returncode is None:
            program.kill()
        await program.wait()
        for home in homes:
            end_server_processes(home)


@contextlib.contextmanager
def segment(key: int) -> Iterator[int]:
    """Make a System V segment, as a server would, and remove it if it is still there."""
    identifier = libc.shmget(ctypes.c_int32(key), 56, IPC_CREAT | 0o600)
    assert identifier >= 0
    try:
        yield identifier
    finally:
        libc.shmctl(identifier, IPC_RMID, None)


@pytest.mark.parametrize(
    ("key", "creator", "user", "left"),
    [
        pytest.param(0, 0, 0, False, id="its-own"),
        pytest.param(1, 0, 0, True, id="with-another-key"),
        pytest.param(0, 1, 0, True, id="of-another-process"),
        pytest.param(0, 0, 1, True, id="of-another-user", marks=AS_ROOT),
    ],
)
@pytest.mark.parametrize("sign", [1, -1], ids=["postmaster", "standalone"])
def test_segment_that_has_the_id_by_chance_is_left_alone(
    kept_dir: Path, *, key: int, creator: int, user: int, left: bool, sign: int
) -> None:
    """Ids are used again after a restart of the machine, and `postmaster.pid` of a killed server stays."""
    directory = kept_dir / "data"
    directory.mkdir()
    # Keys are signed, and Postgres writes them as unsigned 64-bit numbers.
    with segment(-directory.stat().st_ino) as identifier:
        named = f"{2**64 - directory.stat().st_ino + key} {identifier:9}"
        lines = [str(sign * (os.getpid() + creator)), str(directory), "1", "5432", "/run", "localhost", named]
        (directory / "postmaster.pid").write_text("\n".join([*lines, "ready   ", ""]))
        os.chown(directory, directory.stat().st_uid + user, -1)
        remove_with_shared_memory(directory)
        assert left == any(there.split()[1] == str(identifier) for there, _, _ in system_v())
    assert not directory.exists()


@pytest.mark.parametrize("text", ["", "4711\n", "x\n" * 7, "1\n2\n3\n4\n5\n6\n7\n"])
def test_lock_file_that_is_not_complete_names_no_segment(kept_dir: Path, text: str) -> None:
    """Of a server that was killed while it wrote it."""
    directory = kept_dir / "data"
    directory.mkdir()
    (directory / "postmaster.pid").write_text(text)
    remove_with_shared_memory(directory)
    assert not directory.exists()


def test_segments_are_read_where_only_ipcs_lists_them() -> None:
    """As POSIX has its output, and macOS prints it."""
    listing = """\
IPC status from <running system> as of Tue Mar  5 10:11:12 CET 2024
T     ID     KEY        MODE       OWNER    GROUP NATTCH   CPID   LPID
Shared Memory:
m  65536 0x0052e2c1 --rw-------     root    wheel      0   4711   4712
m  65537 0xffe2c100 --rw-------     root    wheel      6   4713   4714
m  65538 0x00000001 --rw------- no-user-1    wheel      6   4713   4714
"""
    assert [(65536, 0x52E2C1, 4711, 0, 0), (65537, 0xFFE2C100, 4713, 0, 6)] == list(
        segments_listed_by_ipcs(listing)
    )


async def test_segment_is_removed_when_the_last_process_has_gone() -> None:
    """Never before: those of a server that was just killed take their time."""
    async with local_cluster(ClusterSettings(replicas=0, port=0)) as cluster:
        node = cluster.primary
        shared = shared_by(node.data_dir)
        node.freeze()
        killed(node)
        removing = asyncio.create_task(asyncio.to_thread(remove_with_shared_memory, node.data_dir), name="remove")
        await asyncio.sleep(0.1)  # it is checked ten times meanwhile
        assert shared == shared.left()
        end_server_processes(node.data_dir)
        await removing
        assert NOTHING == shared.left()
        assert not node.exists
