"""The control socket of a running cluster: commands, faults and `heal`, over a private unix socket.

A request is one line of JSON, `{"command": "pause", "node": "replica2"}`, and so is the answer: `{"ok": ...}` or
`{"error": "..."}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocket.cluster import directories, faults
from rocket.cluster.cluster import FIRST_PRIMARY, CarriedOut
from rocket.cluster.errors import ClusterNotFound, NodeNotRunning, NotAReplica, NotHealed, Refused
from rocket.cluster.faults import NODE_COMMANDS
from rocket.cluster.node import Fault
from rocket.cluster.rejoin import bring_up
from rocket.errors import RocketError, describe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Mapping

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

    _Request = dict[str, Any]

_REQUEST_TIMEOUT_S = 5.0  # clients are programs on this machine
_ANSWER_TIMEOUT_S = 90.0  # a start may have to recover
UP_TIMEOUT_S = 60.0
"""How long `heal` waits for a node: it may have to be cloned anew first."""
_PENDING_TIMEOUT_S = 20.0  # more than any fault takes: to connect, to ask, to see a receiver end

_log = logging.getLogger("rocket.control")


@contextlib.asynccontextmanager
async def listening(
    cluster: LocalCluster, down: Callable[[], None], *, api: Mapping[str, object] | None = None
) -> AsyncIterator[None]:
    """Take commands for a cluster for as long as the context lasts.

    `down` ends the program; `api` describes the API that this program serves, if it does.
    """
    controller = _Controller(cluster, down, api)
    server = await asyncio.start_unix_server(controller.answer, cluster.control_socket)
    cluster.control_socket.chmod(0o600)
    try:
        yield
    finally:
        server.close()
        await controller.drop()


class _Controller:
    def __init__(self, cluster: LocalCluster, down: Callable[[], None], api: Mapping[str, object] | None) -> None:
        self._cluster = cluster
        self._down = down
        self._api = api
        self._pending: dict[asyncio.Task[None], str] = {}
        """The command that each task carries out; empty until it has been read."""

    async def drop(self) -> None:
        """Cancel the commands that are being carried out: none acts on a cluster that is going down."""
        for task in self._pending:
            task.cancel()
        await asyncio.gather(*self._pending, return_exceptions=True)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry out the one request that a connection brings."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._pending[task] = ""
        try:
            await self._answer(task, reader, writer)
        finally:
            del self._pending[task]
            writer.close()

    async def _answer(
        self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                request = json.loads(await reader.readline())
            self._pending[task] = _name_of(request)
            answer = {"ok": await self._carry_out(request)}
        except (RocketError, ValueError, KeyError, TypeError, TimeoutError) as error:
            answer = {"error": str(error) or type(error).__name__}
        except Exception:  # noqa: BLE001 - logged with its traceback
            _log.exception("a command failed")
            answer = {"error": "internal error: see the program's log"}
        with contextlib.suppress(OSError, TimeoutError):
            writer.write(json.dumps(answer).encode() + b"\n")
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                await writer.drain()

    async def _carry_out(self, request: dict[str, Any]) -> object:
        command = request["command"]
        match command:
            case "status":
                return await self._cluster.describe_nodes()
            case "addresses":
                return self._addresses(by_tcp=bool(request.get("by_tcp")))
            case "api":
                return self._api
            case "down":
                self._down()
                return "going down"
        if command != "heal" and command not in NODE_COMMANDS:
            raise Refused(f"there is no command {command!r}")
        began = time.monotonic()
        try:
            outcome = await self._change(request)
        except Exception as error:
            self._report(request, began, describe(error), ok=False)
            raise
        self._report(request, began, outcome, ok=True)
        return outcome

    async def _change(self, request: _Request) -> str:
        command = request["command"]
        if command == "heal":
            _log.info("heal")
            pending = [
                task
                for task, name in self._pending.items()
                if name in NODE_COMMANDS and NODE_COMMANDS[name].asks_server
            ]
            return await heal(self._cluster, pending)
        node = self._cluster.node(request["node"])
        _log.info("%s %s", command, node.name)
        outcome = await NODE_COMMANDS[_name_of(request)].act(self._cluster, node, request)
        return f"{_named(self._cluster, node)} {outcome}"

    def _report(self, request: _Request, began: float, outcome: str, *, ok: bool) -> None:
        done = CarriedOut(_name_of(request), request.get("node"), began, outcome, ok, request.get("delay_ms"))
        for report in self._cluster.on_command:
            report(done)

    def _addresses(self, *, by_tcp: bool) -> dict[str, object]:
        database, nodes = self._cluster.settings.database, self._cluster.nodes
        if by_tcp:
            password = self._cluster.password()
            return {"nodes": {name: node.tcp_dsn(database, password) for name, node in nodes.items()}}
        return {"nodes": {name: node.dsn(database) for name, node in nodes.items()}}


def _name_of(request: _Request) -> str:
    """Return the name in the table of the command that is requested: `kill` with `backend` is `kill-backend`."""
    command = str(request["command"])
    flags = (each for each in NODE_COMMANDS.values() if each.flag_of == command)
    return next((each.name for each in flags if request.get(each.name.removeprefix(f"{command}-"))), command)


def _named(cluster: LocalCluster, node: Node) -> str:
    """Return a node's name so that it is not taken for its role."""
    former = node.name == FIRST_PRIMARY and node is not cluster.primary
    return f"{node.name} (now a replica)" if former else node.name


async def heal(
    cluster: LocalCluster, pending: Collection[asyncio.Task[None]] = (), *, up_within_s: float = UP_TIMEOUT_S
) -> str:
    """Undo every fault on every node, start those that were given up, and return once all are up.

    Faults that are still being carried out are waited for: they would take effect after what undoes them. Raise
    `NotHealed`, which names each node that is not up within `up_within_s`; the others are healed all the same.
    """
    nodes = list(cluster.nodes.values())
    for node in nodes:
        if node.halted:
            node.thaw()
    if pending:
        await asyncio.wait(pending, timeout=_PENDING_TIMEOUT_S)
    for node in nodes:
        # First: if the rest fails, its next start is a normal one.
        node.lift(Fault.DELAYED)
        node.lift(Fault.CUT)
    deadline = asyncio.get_running_loop().time() + up_within_s
    primary = cluster.primary
    outcomes = [await _heal(cluster, primary, deadline)]  # first: the others may need a copy of it
    others = [node for node in nodes if node is not primary]
    outcomes += await asyncio.gather(*(_heal(cluster, node, deadline) for node in others))
    if left := [why for why in outcomes if why is not None]:
        raise NotHealed("; ".join(left))
    return "all nodes are up, and nothing holds them back"


async def _heal(cluster: LocalCluster, node: Node, deadline: float) -> str | None:
    """Heal a node; return what is wrong with it if it is not up in the end."""
    try:
        async with asyncio.timeout_at(deadline):
            if not node.wanted:
                await bring_up(cluster, node)
            if node.recovering:  # perhaps for want of its primary
                node.reconfigure(cluster.upstream_port(node))
            await node.up.wait()  # one that is restarting, rejoining or recovering comes up by itself
        node.reconfigure(cluster.upstream_port(node))
        with contextlib.suppress(NotAReplica):
            await faults.resume(node)
    except NodeNotRunning:
        pass  # it has died since, and comes back without the pause
    except (RocketError, OSError, TimeoutError) as error:
        if node.recovering:
            return f"{node.name} {node.outlook}"
        return f"{node.name} is not back ({node.describe_state()}): {describe(error)}"
    return None


async def ask(run_dir: Path, command: str, timeout_s: float | None = None, /, **details: object) -> Any:
    """Send a command to a running cluster and return its answer.

    Raise `Refused` if it refuses or does not answer within `timeout_s`, by default as long as a start may take,
    and `ClusterNotFound`.
    """
    timeout_s = _ANSWER_TIMEOUT_S if timeout_s is None else timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(directories.control_socket(run_dir), limit=2**20)
            try:
                writer.write(json.dumps({"command": command, **details}).encode() + b"\n")
                answer = json.loads(await reader.readline())
            finally:
                writer.close()
    except TimeoutError:
        raise Refused(f"no answer to {command!r} within {timeout_s:g} s") from None
    except (OSError, ValueError) as error:
        raise ClusterNotFound(f"the cluster in {run_dir} does not take commands: {error}") from None
    if "error" in answer:
        raise Refused(answer["error"])
    return answer["ok"]


def find(data_dir: Path | None, port: int | None) -> Path:
    """Return the run directory of the one running cluster that fits; raise `ClusterNotFound`."""
    runs = list(directories.running())
    fitting = [
        path
        for path, description in runs
        if (data_dir is None or Path(description.data_dir) == data_dir.resolve())
        and (port is None or port in description.ports.values())
    ]
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(
        f"port {min(description.ports.values())}, data directory {description.data_dir}" for _, description in runs
    )
    if not runs:
        raise ClusterNotFound("no cluster of this user is running: start one with `rocket cluster up`")
    if not fitting:
        raise ClusterNotFound(f"no such cluster is running; there are: {known}")
    raise ClusterNotFound(f"several clusters are running, name one by --postgres-port or --data-dir: {known}")
