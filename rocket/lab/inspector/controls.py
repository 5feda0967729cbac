"""What the page's buttons do: orders in, a sentence out."""

from __future__ import annotations

import asyncio
import math
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from rocket import Routing, Unavailable
from rocket.cluster import control
from rocket.cluster.faults import NODE_COMMANDS
from rocket.errors import RocketError
from rocket.lab.api.problems import Problem
from rocket.lab.inspector.event_log import Paced, Switched

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rocket import Router
    from rocket.lab.inspector.event_log import EventLog
    from rocket.lab.inspector.targets import Targets

_PATIENCE_S = 20.0
"""How long an order may take, before the API's own time limit for requests."""
_HEAL_PATIENCE_S = 10.0
"""As it may have waited for a scenario's end before."""
_FASTEST = 1000.0
"""Rides a second that the simulator may be told to make."""
_STATES_S = 1.0
_STATES_TIMEOUT_S = 5.0


class Controls:
    """Acts on the cluster by its one door, on the router, and on the simulator."""

    def __init__(self, reach: Targets, router: Router[str], journal: EventLog) -> None:
        self.states: tuple[float, dict[str, Any]] | None = None
        """How the nodes are, and when (monotonic) that was asked; None if nothing recent is known."""
        self._reach = reach
        self._router = router
        self._journal = journal

    async def carry_out(self, order: Mapping[str, Any]) -> str:
        """Do what is ordered and say what came of it; raise `Problem`, in words for the client."""
        command = order.get("command")
        patience_s = _HEAL_PATIENCE_S if command == "heal" else _PATIENCE_S
        try:
            async with asyncio.timeout(patience_s):
                match command:
                    case "routing":
                        return await self.route(order.get("routing"))
                    case "simulator":
                        return self.pace(order.get("rate"))
                    case str() if command in NODE_COMMANDS or command == "heal":
                        return await self.disturb(command, order.get("node"), order.get("delay_ms"))
        except TimeoutError:
            text = f"'{command}' is not done after {patience_s:g} s; it goes on."
            raise Problem(HTTPStatus.GATEWAY_TIMEOUT, text) from None
        except Unavailable as error:
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, f"It cannot be switched now: {error}.") from None
        except RocketError as error:
            raise Problem(HTTPStatus.CONFLICT, f"{error}") from None
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "There is no such command.")

    async def disturb(self, command: str, node: object = None, delay_ms: object = None) -> str:
        """Do something to a node, or heal all; raise `RocketError` if the cluster refuses."""
        run_dir = _there(self._reach.run_dir)
        if command == "heal":
            return str(await control.ask(run_dir, "heal"))
        if not isinstance(node, str):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "Please name a node.")
        details: dict[str, object] = {"node": node}
        if command == "delay":
            if not isinstance(delay_ms, int) or isinstance(delay_ms, bool):
                raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "A delay is a whole number of milliseconds.")
            details["delay_ms"] = delay_ms
        if command == "kill-backend":
            command, details["backend"] = "kill", True
        return str(await control.ask(run_dir, command, **details))

    async def route(self, name: object) -> str:
        """Route by another rule; raise `Unavailable` if the primary has to be asked first, and does not answer."""
        if not isinstance(name, str) or name not in set(Routing):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"A routing is one of {', '.join(Routing)}.")
        routing = Routing(name)
        before = await self._router.switch(routing)
        if routing is not before:
            self._journal.add(Switched(time.monotonic(), routing, before))
        return f"Reads are routed by '{routing}' from now on."

    def pace(self, rate: object) -> str:
        """Let the simulator make so many rides a second; 0: none, None: as one client does."""
        simulator = self._reach.simulator
        if simulator is None:
            raise Problem(HTTPStatus.CONFLICT, "There is no simulator in this program.")
        if rate is not None and (
            not isinstance(rate, int | float)
            or isinstance(rate, bool)
            or not math.isfinite(rate)
            or not 0 <= rate <= _FASTEST
        ):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"A rate lies between 0 and {_FASTEST:g}, or is null.")
        simulator.rate = rate
        self._journal.add(Paced(time.monotonic(), rate))
        return "The simulator is one client." if rate is None else f"The simulator makes {rate:g} rides a second."

    async def watch_nodes(self, run_dir: Path) -> None:
        """Ask how the nodes are, once a second; a cluster that does not say is not waited for for long."""
        asked_at = time.monotonic()
        try:
            async with asyncio.timeout(_STATES_TIMEOUT_S):
                nodes = await control.ask(run_dir, "status")
        except (RocketError, TimeoutError):
            self.states = None
        else:
            self.states = asked_at, {node["name"]: _state_of(node) for node in nodes}
        await asyncio.sleep(_STATES_S)


def _there(run_dir: Path | None) -> Path:
    if run_dir is None:
        raise Problem(HTTPStatus.CONFLICT, "This program does not run the cluster.")
    return run_dir


def _state_of(node: Mapping[str, Any]) -> dict[str, Any]:
    state = "paused" if node["paused"] and node["state"] == "up" else node["state"]
    return {
        "state": state,
        **{name: node[name] for name in ("timeline", "paused", "delay_ms", "cut", "role")},
    }
