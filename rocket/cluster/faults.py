"""Faults on demand: what each one does to a node, and the one table of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import asyncpg
import psutil

from rocket.cluster.errors import NodeFrozen, NodeNotRunning, NotAReplica, Refused
from rocket.cluster.node import Fault
from rocket.cluster.promotion import promote, terminate_receiver
from rocket.cluster.rejoin import bring_up
from rocket.errors import unwrapping_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

ReplicationProcess = Literal["startup", "walreceiver"]
"""As `pg_stat_activity` has it in `backend_type`: the process that replays, and the one that receives."""

_CUT_TIMEOUT_S = 5.0  # a receiver ends within milliseconds of its signal
_POLL_S = 0.01
_SAMPLES_WITHOUT_RECEIVER = 25
"""Consecutive samples: after `wal_retrieve_retry_interval`, a process that has not reloaded may start it again."""
_LONGEST_DELAY_MS = 3_600_000

_CONNECTIONS_AT_A_TIME = 20
_HELD_S = 60
_VACUUM_EVERY_S = 0.1

_PAUSE = "SELECT pg_wal_replay_pause()"
_RESUME = "SELECT pg_wal_replay_resume()"
_RELOAD = "SELECT pg_reload_conf()"
_PROCESS = "SELECT pid FROM pg_stat_activity WHERE backend_type = $1"
_END_SENDERS = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_replication WHERE application_name = $1"

_END_SESSIONS = """
    SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
     WHERE datname = $1 AND application_name = 'rocket'
"""
_WAIT_FOR_QUERIES = "ALTER SYSTEM SET max_standby_streaming_delay = '300ms'"
_WAIT_AS_EVER = "ALTER SYSTEM RESET max_standby_streaming_delay"


async def pause(node: Node) -> None:
    """Stop a replica's replay: it goes on receiving, and falls behind."""
    await _on_replica(node, _PAUSE)


async def resume(node: Node) -> None:
    """Let a paused replica replay again."""
    await _on_replica(node, _RESUME)


async def delay(node: Node, delay_ms: int, upstream_port: int) -> None:
    """Make a replica apply each commit by a number of milliseconds late; 0 ends it."""
    _check_replica(node)
    async with node.connected() as connection:
        node.impose(Fault.DELAYED, delay_ms)
        node.configure(upstream_port)
        await connection.execute(_RELOAD)


async def cut(node: Node, upstream_port: int) -> None:
    """Keep a replica from its primary: it stays up and answers, and receives no WAL, also after a restart.

    Raise `NodeNotRunning` if its WAL receiver does not end.
    """
    _check_replica(node)
    async with node.connected() as connection:
        node.impose(Fault.CUT)
        node.configure(upstream_port)
        await connection.execute(_RELOAD)
        try:
            async with asyncio.timeout(_CUT_TIMEOUT_S):
                samples = 0
                while samples < _SAMPLES_WITHOUT_RECEIVER:
                    receiver = await connection.fetchval(_PROCESS, "walreceiver")
                    if receiver is not None:
                        terminate_receiver(node, receiver)
                    samples = samples + 1 if receiver is None else 0
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise NodeNotRunning(f"the WAL receiver of {node.name} does not end") from None


async def reconnect(node: Node, upstream_port: int) -> None:
    """Let a replica that was cut reach its primary again."""
    _check_replica(node)
    node.lift(Fault.CUT)  # first: if this fails, its next start is with a link
    async with node.connected() as connection:
        node.configure(upstream_port)
        await connection.execute(_RELOAD)


async def kill_backend(node: Node) -> None:
    """Kill one of a node's backends: its postmaster then ends all sessions and recovers from the WAL."""
    async with node.connected() as connection:
        os.kill(connection.get_server_pid(), signal.SIGKILL)


async def halt(node: Node, kind: ReplicationProcess) -> None:
    """Halt only the process of a replica that replays, or the one that receives; `let_go` undoes it.

    Raise `NotAReplica`, `NodeFrozen` if it is halted already, or `NodeNotRunning` where there is none now.
    """
    _check_replica(node)
    if Fault(kind) in node.faults:
        raise NodeFrozen(f"the {kind} process of {node.name} is halted already")
    async with node.connected() as connection:
        pid = await connection.fetchval(_PROCESS, kind)
    missing = NodeNotRunning(f"{node.name} has no {kind} process now")
    if pid is None:
        raise missing
    try:
        process = psutil.Process(pid)
        if process.cwd() != str(node.data_dir):  # another process has the id by now
            raise missing
        process.suspend()
    except psutil.Error:
        raise missing from None
    node.impose(Fault(kind), process)


def let_go(node: Node, kind: ReplicationProcess) -> None:
    """Let a halted process continue, if it still exists: not one that has its id by now.

    Raise `NodeNotRunning` if none was halted, or its server has ended since.
    """
    process = node.lift(Fault(kind))
    if process is None:
        raise NodeNotRunning(f"no {kind} process of {node.name} is halted")
    with contextlib.suppress(psutil.Error):
        process.resume()  # psutil compares the time at which the process began


async def cut_sender(cluster: LocalCluster, node: Node) -> None:
    """Terminate the process of the primary that sends WAL to a replica, which connects again by itself.

    Raise `NotAReplica`, or `NodeNotRunning` where there is no sender now, as behind a frozen primary.
    """
    if node is cluster.primary:
        raise NotAReplica(f"{node.name} is the primary: no server sends it WAL")
    async with cluster.primary.connected() as connection:
        ended = await connection.fetchval(_END_SENDERS, node.name)
    if not ended:
        raise NodeNotRunning(f"{cluster.primary.name} sends {node.name} nothing now")


async def end_sessions(node: Node, database: str) -> None:
    """Terminate the sessions of pools on a node; those of observers go on."""
    async with node.connected() as connection:
        await connection.execute(_END_SESSIONS, database)


@contextlib.asynccontextmanager
async def full(cluster: LocalCluster, node: Node) -> AsyncIterator[dict[str, Any]]:
    """Take all connections that a node accepts, those of pools included, and give them back at the end."""
    taken: list[asyncpg.Connection[Any]] = []
    try:
        for _ in range(3):  # pools may be faster
            await _take_connections(node, taken)
            await taken[0].execute(_END_SESSIONS, cluster.settings.database)
        await _take_connections(node, taken)
        yield {"connections": len(taken)}
    finally:
        for connection in taken:
            connection.terminate()


async def _take_connections(node: Node, taken: list[asyncpg.Connection[Any]]) -> None:
    while True:
        attempts = (node.connect() for _ in range(_CONNECTIONS_AT_A_TIME))
        refusals = []
        for result in await asyncio.gather(*attempts, return_exceptions=True):
            if isinstance(result, BaseException):
                refusals.append(result)
            else:
                taken.append(result)
        for refusal in refusals:
            if not isinstance(refusal, asyncpg.TooManyConnectionsError):
                raise refusal
        if refusals:
            return


@contextlib.asynccontextmanager
async def long_query(cluster: LocalCluster, node: Node, table: str) -> AsyncIterator[dict[str, Any]]:
    """Run a long query on a replica while its primary removes the old rows of a table, which the query may see.

    Replay there waits for the query, for 0.3 s at the most, and cancels it; then there is another one.
    """
    _check_replica(node)
    async with node.connected() as connection:
        await connection.execute(_WAIT_FOR_QUERIES)
        await connection.execute(_RELOAD)
    detail: dict[str, Any] = {"cancelled": 0}
    try:
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                tasks = (
                    group.create_task(_query_long(cluster, node, detail), name=f"long queries on {node.name}"),
                    group.create_task(_remove_old_rows(cluster, table), name=f"vacuum {table}"),
                )
                yield detail
                for task in tasks:
                    task.cancel()
    finally:
        async with node.connected() as connection:
            await connection.execute(_WAIT_AS_EVER)
            await connection.execute(_RELOAD)


async def _query_long(cluster: LocalCluster, node: Node, detail: dict[str, Any]) -> None:
    while True:
        with contextlib.suppress(OSError, asyncpg.InterfaceError, asyncpg.PostgresError):
            connection = await node.connect(cluster.settings.database)
            try:
                await connection.execute(f"SELECT pg_sleep({_HELD_S})")
            except asyncpg.SerializationError:
                detail["cancelled"] += 1
            finally:
                connection.terminate()
        await asyncio.sleep(_POLL_S)


async def _remove_old_rows(cluster: LocalCluster, table: str) -> None:
    while True:
        with contextlib.suppress(OSError, asyncpg.InterfaceError, asyncpg.PostgresError):
            connection = await cluster.primary.connect(cluster.settings.database)
            try:
                while True:
                    await connection.execute(f"VACUUM (TRUNCATE false) {table}")
                    await asyncio.sleep(_VACUUM_EVERY_S)
            finally:
                connection.terminate()
        await asyncio.sleep(_POLL_S)


async def _on_replica(node: Node, statement: str) -> None:
    _check_replica(node)
    async with node.connected() as connection:
        await connection.execute(statement)


def _check_replica(node: Node) -> None:
    if not node.is_replica:
        raise NotAReplica(f"{node.name} is the primary: only a replica replays")


# --- the table ---

Details = Mapping[str, Any]
"""What a command takes, by name."""


@dataclass(frozen=True, slots=True)
class NodeCommand:
    """A command that acts on one node: a fault, what undoes one, or a change of roles."""

    name: str
    help: str
    act: Callable[[LocalCluster, Node, Details], Awaitable[str]]
    """Carries it out; returns what came of it, to follow the node's name."""
    takes: str | None = None
    """The argument that it takes besides the node: `delay_ms`, an integer."""
    flag_of: str | None = None
    """The command that it is a flag of on the command line and the control socket: `kill --backend`."""
    undone_by: str | None = None
    """The command that undoes it; None: it is over by itself, or is no fault."""
    lasts: bool = False
    """Whether it is still in force after a restart of the server."""
    asks_server: bool = False
    """Whether it acts only once the server has answered: perhaps after a `heal` that came later."""


async def _pause(_cluster: LocalCluster, node: Node, _details: Details) -> str:
    await pause(node)
    return "does not replay until it is resumed"


async def _resume(_cluster: LocalCluster, node: Node, _details: Details) -> str:
    await resume(node)
    return "replays"


async def _delay(cluster: LocalCluster, node: Node, details: Details) -> str:
    delay_ms = int(details["delay_ms"])
    if not 0 <= delay_ms <= _LONGEST_DELAY_MS:
        raise Refused(f"a delay lies between 0 and {_LONGEST_DELAY_MS} ms")
    await delay(node, delay_ms, cluster.upstream_port(node))
    return f"applies commits {delay_ms} ms late" if delay_ms else "applies commits at once again"


async def _kill(_cluster: LocalCluster, node: Node, _details: Details) -> str:
    node.kill()
    return "was killed, and comes back by itself"


async def _kill_backend(_cluster: LocalCluster, node: Node, _details: Details) -> str:
    await kill_backend(node)
    return "lost a backend, and recovers by itself"


async def _stop(_cluster: LocalCluster, node: Node, _details: Details) -> str:
    await node.stop()
    return "is stopped until it is started"


async def _start(cluster: LocalCluster, node: Node, _details: Details) -> str:
    await bring_up(cluster, node)
    return node.outlook


async def _restart(cluster: LocalCluster, node: Node, details: Details) -> str:
    await node.stop()
    return await _start(cluster, node, details)


async def _freeze(_cluster: LocalCluster, node: Node, _details: Details) -> str:
    node.freeze()
    return "is frozen until it is thawed"


async def _thaw(_cluster: LocalCluster, node: Node, _details: Details) -> str:
    killed = node.frozen and node.suspect
    node.thaw()
    return "missed a promotion: it was killed, and rejoins the new primary" if killed else "goes on"


async def _cut(cluster: LocalCluster, node: Node, _details: Details) -> str:
    await cut(node, cluster.upstream_port(node))
    return "gets no WAL until its link is mended"


async def _mend(cluster: LocalCluster, node: Node, _details: Details) -> str:
    await reconnect(node, cluster.upstream_port(node))
    return f"reaches {cluster.primary.name} again, and follows it"


async def _promote(cluster: LocalCluster, node: Node, _details: Details) -> str:
    return await promote(cluster, node.name)


NODE_COMMANDS: Mapping[str, NodeCommand] = {
    command.name: command
    for command in (
        NodeCommand(
            "pause", "stop a replica's replay: it goes on receiving, and falls behind", _pause,
            undone_by="resume", asks_server=True,
        ),
        NodeCommand("resume", "let a paused replica replay again", _resume),
        NodeCommand(
            "delay", "make a replica apply commits late (0 ends it)", _delay,
            takes="delay_ms", undone_by="delay", lasts=True, asks_server=True,
        ),
        NodeCommand("kill", "crash a server; it comes back by itself", _kill),
        NodeCommand(
            "kill-backend", "one of its backends, not the whole server", _kill_backend,
            flag_of="kill", asks_server=True,
        ),
        NodeCommand("stop", "stop a server until it is started", _stop, undone_by="start"),
        NodeCommand("start", "start a stopped server", _start),
        NodeCommand("restart", "stop a server and start it again", _restart),
        NodeCommand(
            "freeze", "halt all processes of a server: it keeps its connections and says nothing", _freeze,
            undone_by="thaw",
        ),
        NodeCommand("thaw", "let a frozen server go on", _thaw),
        NodeCommand(
            "cut", "keep a replica from its primary: it answers, and receives nothing", _cut,
            undone_by="mend", lasts=True, asks_server=True,
        ),
        NodeCommand("mend", "let a replica reach its primary again", _mend),
        NodeCommand(
            "promote", "make a replica the primary; the old primary goes down first, and then follows it", _promote
        ),
    )
}  # fmt: skip
"""Every command on one node, by its name: the command line, the control socket and the inspector offer these."""
