"""A cluster on this machine that Patroni runs: three members and the etcd that they agree by."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from rocket.cluster.cluster import prepare_database
from rocket.cluster.errors import ServerFailedToStart, ServerKeepsDying
from rocket.cluster.process import end_server_processes
from rocket.cluster.supervisor import RestartPolicy
from rocket.errors import unwrapping_group
from rocket.lab.patroni import programs
from rocket.lab.patroni.configuration import HOST, SUPERUSER
from rocket.topology.patroni_rest import PatroniSilent, RestClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from rocket.lab.patroni.daemon import Daemon
    from rocket.lab.patroni.node import PatroniNode
    from rocket.topology.patroni_members import Member

MEMBERS = 3
"""As many as it takes for a replica to be left when the leader is lost, and for reads to choose."""

_START_S = 90.0
"""Until all members stream: one is made by initdb, the others as base backups of it."""
_POLL_S = 0.1
_RUNNING, _STREAMING = "running", "streaming"
_CHECK_S = 0.2
CONFIGURATION = "patroni.json"
"""In each member's directory."""

_log = logging.getLogger("rocket.patroni")


@dataclass(frozen=True, slots=True)
class PatroniSettings:
    """What a local Patroni cluster is made of."""

    members: int = MEMBERS
    port: int = 5433
    """Of the first member; the others have the next ones. 0: any free ones, also for the REST API."""
    postgres_bin: Path | None = None
    database: str = "postgres"
    schema: str = ""
    """SQL that makes the tables, harmless to apply again."""
    tags: Mapping[str, Mapping[str, bool]] | None = None
    """Patroni's tags, by member."""
    detours: Mapping[str, str] | None = None
    """The addresses by which a member is reached by the others, and reaches etcd; none: the usual one.

    Somebody has to stand there, and pass on what comes to a port to the same port of 127.0.0.1.
    """


class PatroniCluster:
    """The members, as subprocesses of this program."""

    def __init__(
        self,
        settings: PatroniSettings,
        nodes: Mapping[str, PatroniNode],
        etcd: Daemon,
        client: RestClient,
        *,
        etcd_port: int,
        password_file: Path,
        login: tuple[str, str],
    ) -> None:
        self.settings = settings
        self.nodes = nodes
        self.etcd = etcd
        self.etcd_port = etcd_port
        self.password_file = password_file
        """The superuser's, in libpq's own format."""
        self._client = client
        self._login = login

    @property
    def urls(self) -> list[str]:
        """The members' REST APIs."""
        return [node.url for node in self.nodes.values()]

    @property
    def dsn_template(self) -> str:
        """The address of the database on a member, with `{host}` and `{port}` for where that is."""
        passfile = quote(str(self.password_file), safe="/")
        if self.settings.detours:  # are for members alone
            rest = f"{self.settings.database}?passfile={passfile}&application_name={{host}}"
            return f"postgresql://{SUPERUSER}@{HOST}:{{port}}/{rest}"
        return f"postgresql://{SUPERUSER}@{{host}}:{{port}}/{self.settings.database}?passfile={passfile}"

    @property
    def control(self) -> str:
        """The beginning of a command line by which people talk to Patroni."""
        return programs.patronictl(next(iter(self.nodes.values())).home / CONFIGURATION)

    def how_to_use(self) -> list[str]:
        """Return lines that tell people what they can do with it."""
        way = f"-h {HOST} -p {next(iter(self.nodes.values())).port} -U {SUPERUSER} {self.settings.database}"
        source = f"--patroni {','.join(self.urls)} --patroni-dsn '{self.dsn_template}'"
        return [
            f"connect:  PGPASSFILE={self.password_file} psql {way}",
            f"Patroni:  {self.control} list",
            f"rocket:   python -m rocket run-all --no-cluster {source}",
        ]

    async def members(self) -> dict[str, Member]:
        """Return the members as Patroni lists them; raise `PatroniSilent`."""
        return {member.name: member for member in (await self._client.listing()).members}

    async def leader(self) -> PatroniNode:
        """Return the member that leads now; raise `PatroniSilent` if there is none."""
        for member in (await self.members()).values():
            if member.leads:
                return self.nodes[member.name]
        raise PatroniSilent("Patroni has no leader")

    async def is_whole(self) -> bool:
        """Tell whether there is a leader, and all others stream from it."""
        with contextlib.suppress(PatroniSilent):
            members = await self.members()
            return len(members) == len(self.nodes) and all(
                member.state == (_RUNNING if member.leads else _STREAMING) for member in members.values()
            )
        return False

    async def order(self, node: PatroniNode, what: str, **body: object) -> None:
        """Have a member's Patroni do something (`switchover`, say); raise `PatroniSilent` if it fails."""
        await self._client.order(node.url, what, self._login, **body)

    # --- the beginning ---

    async def start(self) -> None:
        """Start etcd and the members, and return when there are a leader, the tables, and replicas that stream.

        Raise `ServerFailedToStart` as soon as one of them dies, or where that takes too long.
        """
        began = time.monotonic()
        try:
            async with asyncio.timeout(_START_S):
                await self.etcd.start()
                for node in self.nodes.values():
                    await node.start()
                await self._until(self._has_leader)
                _log.info("%-28s %5.2f s", "a leader", time.monotonic() - began)
                leader = await self.leader()
                await prepare_database(leader, self.settings.database, self.settings.schema)
                await self._until(self.is_whole)
        except TimeoutError:
            raise ServerFailedToStart(
                f"Patroni's cluster did not come up within {_START_S:g} s:\n{self._last_words()}"
            ) from None
        _log.info("%-28s %5.2f s", f"{len(self.nodes)} members stream", time.monotonic() - began)

    async def _until(self, reached: Callable[[], Any]) -> None:
        while not await reached():
            for daemon in self._daemons():
                if daemon.wanted and daemon.pid is None:
                    raise ServerFailedToStart(f"{daemon.name} died while starting:\n{daemon.last_words()}")
            await asyncio.sleep(_POLL_S)

    async def _has_leader(self) -> bool:
        with contextlib.suppress(PatroniSilent):
            return any(member.leads and member.state == _RUNNING for member in (await self.members()).values())
        return False

    def _daemons(self) -> Iterator[Daemon]:
        yield self.etcd
        yield from (node.patroni for node in self.nodes.values())

    def _last_words(self) -> str:
        return "\n".join(f"{daemon.name}:\n{daemon.last_words()}" for daemon in self._daemons())

    # --- meanwhile ---

    async def supervise(self) -> None:
        """Start again what dies without having been stopped; never returns. Raise `ServerKeepsDying`."""
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                for daemon in self._daemons():
                    group.create_task(_keep(daemon), name=f"keep {daemon.name}")

    # --- the end ---

    async def stop(self) -> None:
        """Stop the replicas, then who leads, then etcd; leave nothing running, even if this is cut off."""
        began = time.monotonic()
        try:
            leads = None
            with contextlib.suppress(PatroniSilent):
                leads = await self.leader()
            for node in self.nodes.values():
                node.patroni.wanted = False
            for nodes in ([node for node in self.nodes.values() if node is not leads], [leads]):
                await asyncio.gather(*(node.stop() for node in nodes if node is not None))
            await self.etcd.stop()
        finally:
            await self._client.close()
            self.kill_all()
        _log.info("Patroni, etcd and Postgres stopped in %.2f s", time.monotonic() - began)

    def kill_all(self) -> None:
        """Kill whatever runs, for someone who will not wait."""
        for daemon in self._daemons():
            daemon.wanted = False
            daemon.send_all(signal.SIGKILL)
        for node in self.nodes.values():
            end_server_processes(node.data_dir)


async def _keep(daemon: Daemon) -> None:
    policy = RestartPolicy()
    while True:
        await asyncio.sleep(_CHECK_S)
        if daemon.wanted and daemon.pid is None:
            pause_s = policy.after_death(time.monotonic(), asked=False)
            if pause_s is None:
                raise ServerKeepsDying(f"{daemon.name} keeps dying:\n{daemon.last_words()}")
            _log.warning("%s died: starting it again in %.1f s", daemon.name, pause_s)
            await asyncio.sleep(pause_s)
            if daemon.wanted:
                await daemon.start()
