"""Where scenarios are played: one at a time, and all is put back afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING

import aiohttp

from rocket import Unavailable
from rocket.errors import RocketError, describe, unwrapping_group
from rocket.lab.api.problems import Problem
from rocket.lab.inspector.scenario_context import ScenarioContext
from rocket.lab.inspector.scenarios import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from rocket.lab.comparison import ComparisonRouter, Routing
    from rocket.lab.inspector.controls import Controls
    from rocket.lab.inspector.event_log import EventLog
    from rocket.lab.inspector.scenarios import Scenario
    from rocket.lab.inspector.targets import Targets

_LONGEST_S = 90.0
_ROUTE_S = 30.0
_PATIENCE_S = 12.0
"""How long an order waits for the end of a scenario; to heal all comes on top of it."""
_RETRY_S = 0.2
_REQUEST_S = 15.0

_log = logging.getLogger("rocket.inspector")


class Runner:
    """Plays what is asked for; `run` is where that happens."""

    def __init__(self, reach: Targets, router: ComparisonRouter, controls: Controls, journal: EventLog) -> None:
        self._reach = reach
        self._router = router
        self._controls = controls
        self._journal = journal
        self._next: Scenario | None = None
        self._ordered = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ending = False
        """Whether what is on is being put back, or will be as soon as it has noticed: nothing may cancel that."""
        self._over = False
        """Whether the whole program ends, and the cluster with it."""

    @property
    def playing(self) -> str | None:
        """The name of the scenario that is on."""
        return None if self._next is None else self._next.name

    def begin(self, name: object) -> str:
        """Have a scenario played; raise `Problem` if there is none of that name, or one is on."""
        scenario = SCENARIOS.get(name) if isinstance(name, str) else None
        if scenario is None:
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"A scenario is one of {', '.join(SCENARIOS)}.")
        self.refuse_while_playing()
        if not self._router.board.replicas:
            raise Problem(HTTPStatus.CONFLICT, "No replica is observed: there is nothing to show.")
        self._next = scenario
        self._ordered.set()
        return f"'{scenario.title}' begins."

    def refuse_while_playing(self) -> None:
        """Raise a `Problem` while a scenario is on."""
        if self.playing is not None:
            raise Problem(HTTPStatus.CONFLICT, f"The scenario '{self.playing}' is on; to heal all ends it.")

    async def end(self) -> None:
        """End the scenario that is on, and wait until all is put back; raise a `Problem` if that takes long."""
        if self._task is None:
            return
        if not self._ending:
            self._ending = True
            self._task.cancel()
        _, pending = await asyncio.wait((self._task,), timeout=_PATIENCE_S)
        if pending:
            text = f"The scenario '{self.playing}' has been ended; it is still being put back."
            raise Problem(HTTPStatus.GATEWAY_TIMEOUT, text)

    async def run(self) -> None:
        """Play what is asked for; never returns."""
        while True:
            await self._ordered.wait()
            self._ordered.clear()
            assert self._next is not None  # noqa: S101 - `begin` sets both
            self._ending = False
            async with asyncio.TaskGroup() as group:
                self._task = group.create_task(self._play(self._next), name=f"scenario {self._next.name}")
                try:
                    await asyncio.wait((self._task,))
                except asyncio.CancelledError:
                    self._over = True
                    raise
            self._task = self._next = None

    async def _play(self, scenario: Scenario) -> None:
        """Play a scenario to its end, whatever that is, and put everything back unless the program ends."""
        routing, simulator = self._router.routing, self._reach.simulator
        rate = None if simulator is None else simulator.rate
        timeout, connector = aiohttp.ClientTimeout(total=_REQUEST_S), aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(self._reach.url, connector=connector, timeout=timeout) as http:
            scene = ScenarioContext(scenario.name, self._router.board, self._controls, self._journal, http)
            scene.say(scenario.text, "began")
            if simulator is not None:
                self._controls.pace(0)
            phase, text = "stopped", "Stopped before its end; what it had done is undone."
            try:
                with unwrapping_group():
                    async with asyncio.timeout(_LONGEST_S):
                        await self._controls.disturb("heal")
                        phase, text = "ended", await scenario.play(scene)
            except Exception as error:  # noqa: BLE001 - the program goes on; viewers and the log are told
                phase, text = "failed", f"It came to nothing: {describe(error)}."
                foreseen = isinstance(error, RocketError | TimeoutError | OSError | aiohttp.ClientError)
                _log.warning("scenario %s: %s", scenario.name, text, exc_info=not foreseen)
            finally:
                self._ending = True
                if not self._over:
                    if amiss := await self._put_back(routing, rate):
                        phase, text = "failed", " ".join((text, *amiss))
                    scene.say(text, phase)
                    _log.info("scenario %s %s: %s", scenario.name, phase, text)

    async def _put_back(self, routing: Routing, rate: float | None) -> list[str]:
        """Make each thing as it was, whatever becomes of the others; return what is not, in sentences."""
        amiss = []
        try:
            if (why := await _failure_of(self._controls.disturb("heal"))) is not None:
                amiss.append(f"Not everything is healed: {why}. Heal all once more.")
            if await _failure_of(self._route(routing)) is not None:
                amiss.append(f"Reads are routed by '{self._router.routing}', not '{routing}' as before.")
        finally:
            if self._reach.simulator is not None:
                self._controls.pace(rate)
        return amiss

    async def _route(self, routing: Routing) -> None:
        """Route as before, as soon as that can be done; raise `TimeoutError`."""
        async with asyncio.timeout(_ROUTE_S):
            while True:
                with contextlib.suppress(Unavailable):
                    await self._controls.route(routing)
                    return
                await asyncio.sleep(_RETRY_S)


async def _failure_of(work: Awaitable[object]) -> str | None:
    """Do a part of putting back; say why it could not be done, or None."""
    try:
        await work
    except Exception as error:  # noqa: BLE001 - the other parts are done all the same
        foreseen = isinstance(error, RocketError | TimeoutError)
        _log.warning("not all is as it was before the scenario: %s", describe(error), exc_info=not foreseen)
        return describe(error)
    return None
