"""What the page's buttons do: a command goes in, a sentence comes out."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from rocket import Unavailable
from rocket.cluster import control
from rocket.cluster.faults import NODE_COMMANDS
from rocket.errors import RocketError
from rocket.lab.api.problems import Problem
from rocket.lab.comparison import ComparisonRouter, Routing
from rocket.lab.inspector.event_log import RateChanged, RoutingChanged

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rocket.cluster.cluster import LocalCluster
    from rocket.lab.inspector.event_log import EventLog
    from rocket.lab.simulator import Simulator

_TIMEOUT_S = 20.0
"""For a command: below the API's own limit for requests."""
_HEAL_TIMEOUT_S = 10.0
"""For `heal`, which may have waited for a scenario to stop before."""
_MAX_RATE = 1000.0
"""Rides a second that the simulator may be set to."""
_STATES_INTERVAL_S = 1.0
_STATES_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Targets:
    """The parts of the program that the inspector acts on."""

    url: str
    """The address of the API."""
    cluster: LocalCluster | None = None
    """None: this program does not run the cluster, and does nothing to it."""
    simulator: Simulator | None = None
    token: str | None = None
    """Admits clients from anywhere, and is then required for commands; None: only clients on this machine."""

    async def ask(self, command: str, **details: object) -> Any:
        """Send a command to the cluster and return its answer; raise `RocketError` if it refuses."""
        if self.cluster is None:
            raise Problem(HTTPStatus.CONFLICT, "This program does not run the cluster.")
        return await control.ask(self.cluster.run_dir, command, **details)


class Controls:
    """Acts on the cluster through its control socket, on the router, and on the simulator."""

    def __init__(self, targets: Targets, router: ComparisonRouter, event_log: EventLog) -> None:
        self.node_states: tuple[float, dict[str, Any]] | None = None
        """The state of each node, and when (monotonic) it was asked for; None if it is not known."""
        self._targets = targets
        self._router = router
        self._event_log = event_log

    async def execute(self, command: Mapping[str, Any]) -> str:
        """Execute a command and return its result as a sentence; raise a `Problem` for the client."""
        name = command.get("command")
        timeout_s = _HEAL_TIMEOUT_S if name == "heal" else _TIMEOUT_S
        try:
            async with asyncio.timeout(timeout_s):
                match name:
                    case "routing":
                        return await self.set_routing(command.get("routing"))
                    case "simulator":
                        return self.set_rate(command.get("rate"))
                    case str() if name in NODE_COMMANDS or name == "heal":
                        return await self.command_cluster(name, command.get("node"), command.get("delay_ms"))
        except TimeoutError:
            text = f"'{name}' is not complete after {timeout_s:g} s; it continues."
            raise Problem(HTTPStatus.GATEWAY_TIMEOUT, text) from None
        except Unavailable as error:
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, f"The routing cannot be changed now: {error}.") from None
        except RocketError as error:
            raise Problem(HTTPStatus.CONFLICT, f"{error}") from None
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "There is no such command.")

    async def command_cluster(self, command: str, node: object = None, delay_ms: object = None) -> str:
        """Send a command for a node to the cluster, or `heal`; raise `RocketError` if the cluster refuses."""
        if command == "heal":
            return str(await self._targets.ask("heal"))
        if not isinstance(node, str):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "Please name a node.")
        details: dict[str, object] = {"node": node}
        if NODE_COMMANDS[command].takes == "delay_ms":
            if not isinstance(delay_ms, int) or isinstance(delay_ms, bool):
                raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "A delay is a whole number of milliseconds.")
            details["delay_ms"] = delay_ms
        return str(await self._targets.ask(command, **details))

    async def set_routing(self, name: object) -> str:
        """Route by another rule; raise `Unavailable` if the primary must be asked first and does not answer."""
        if not isinstance(name, str) or name not in set(Routing):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"A routing is one of {', '.join(Routing)}.")
        routing = Routing(name)
        before = await self._router.switch(routing)
        if routing is not before:
            self._event_log.add(RoutingChanged(time.monotonic(), routing, before))
        return f"Reads are routed by '{routing}' from now on."

    def set_rate(self, rate: object) -> str:
        """Set the simulator's rides a second; 0: none, None: as fast as one client."""
        simulator = self._targets.simulator
        if simulator is None:
            raise Problem(HTTPStatus.CONFLICT, "There is no simulator in this program.")
        if rate is not None and (
            not isinstance(rate, int | float)
            or isinstance(rate, bool)
            or not math.isfinite(rate)
            or not 0 <= rate <= _MAX_RATE
        ):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"A rate lies between 0 and {_MAX_RATE:g}, or is null.")
        simulator.rate = rate
        self._event_log.add(RateChanged(time.monotonic(), rate))
        return "The simulator is one client." if rate is None else f"The simulator makes {rate:g} rides a second."

    async def update_node_states(self) -> None:
        """Ask the cluster for the state of each node, and wait until that is due again."""
        asked_at = time.monotonic()
        try:
            async with asyncio.timeout(_STATES_TIMEOUT_S):
                nodes = await self._targets.ask("status")
        except (RocketError, TimeoutError):
            self.node_states = None
        else:
            self.node_states = asked_at, {node["name"]: _state_of(node) for node in nodes}
        await asyncio.sleep(_STATES_INTERVAL_S)


def _state_of(node: Mapping[str, Any]) -> dict[str, Any]:
    state = "paused" if node["paused"] and node["state"] == "up" else node["state"]
    return {
        "state": state,
        **{name: node[name] for name in ("timeline", "paused", "delay_ms", "cut", "role")},
    }
