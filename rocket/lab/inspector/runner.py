"""Plays scenarios, one at a time, and restores everything afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING

from rocket import Unavailable
from rocket.errors import RocketError, describe, unwrapping_group
from rocket.lab.api.problems import Problem
from rocket.lab.client import Api
from rocket.lab.inspector.scenario_context import ScenarioContext
from rocket.lab.inspector.scenarios import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from rocket.lab.comparison import ComparisonRouter, Routing
    from rocket.lab.inspector.controls import Controls, Targets
    from rocket.lab.inspector.event_log import EventLog
    from rocket.lab.inspector.scenarios import Scenario

_SCENARIO_TIMEOUT_S = 90.0
_ROUTING_TIMEOUT_S = 30.0
_RETRY_S = 0.2
_REQUEST_TIMEOUT_S = 15.0

_log = logging.getLogger("rocket.inspector")


class Runner:
    """Plays the scenario that was started last; `run` is the task in which that happens."""

    def __init__(
        self,
        targets: Targets,
        router: ComparisonRouter,
        controls: Controls,
        event_log: EventLog,
        *,
        stop_timeout_s: float,
        step_timeout_s: float,
    ) -> None:
        self._targets = targets
        self._router = router
        self._controls = controls
        self._event_log = event_log
        self._stop_timeout_s = stop_timeout_s
        self._step_timeout_s = step_timeout_s
        self._next: Scenario | None = None
        self._started = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._restoring = False
        """Whether everything is being restored, or is about to be: that must not be cancelled."""
        self._exiting = False
        """Whether the whole program ends, and the cluster with it."""

    @property
    def playing(self) -> str | None:
        """The name of the scenario that is played."""
        return None if self._next is None else self._next.name

    def start(self, name: object) -> str:
        """Start a scenario; raise `Problem` if there is none of that name, or one is played."""
        scenario = SCENARIOS.get(name) if isinstance(name, str) else None
        if scenario is None:
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"A scenario is one of {', '.join(SCENARIOS)}.")
        self.check_idle()
        if not self._router.board.replicas:
            raise Problem(HTTPStatus.CONFLICT, "No replica is observed, so there is nothing to show.")
        self._next = scenario
        self._started.set()
        return f"'{scenario.title}' begins."

    def check_idle(self) -> None:
        """Raise a `Problem` while a scenario is played."""
        if self.playing is not None:
            raise Problem(HTTPStatus.CONFLICT, f"The scenario '{self.playing}' is running; Heal all stops it.")

    async def stop(self) -> None:
        """Stop the scenario and wait until everything is restored; raise a `Problem` if that takes too long."""
        if self._task is None:
            return
        if not self._restoring:
            self._restoring = True
            self._task.cancel()
        _, pending = await asyncio.wait((self._task,), timeout=self._stop_timeout_s)
        if pending:
            text = f"The scenario '{self.playing}' has been stopped; its changes are still being undone."
            raise Problem(HTTPStatus.GATEWAY_TIMEOUT, text)

    async def run(self) -> None:
        """Play scenarios as they are started; never returns."""
        while True:
            await self._started.wait()
            self._started.clear()
            assert self._next is not None  # noqa: S101 - `start` sets both
            self._restoring = False
            async with asyncio.TaskGroup() as group:
                self._task = group.create_task(self._play(self._next), name=f"scenario {self._next.name}")
                try:
                    await asyncio.wait((self._task,))
                except asyncio.CancelledError:
                    self._exiting = True
                    raise
            self._task = self._next = None

    async def _play(self, scenario: Scenario) -> None:
        """Play a scenario and restore everything, whatever its outcome, unless the program ends."""
        routing, simulator = self._router.routing, self._targets.simulator
        rate = None if simulator is None else simulator.rate
        async with Api(self._targets.url, timeout_s=_REQUEST_TIMEOUT_S) as api:
            context = ScenarioContext(
                scenario.name, self._router.board, self._controls, self._event_log, api, self._step_timeout_s
            )
            context.report(scenario.text, "began")
            if simulator is not None:
                self._controls.set_rate(0)
            phase, text = "stopped", "Stopped before its end; its changes are undone."
            try:
                with unwrapping_group():
                    async with asyncio.timeout(_SCENARIO_TIMEOUT_S):
                        await self._controls.command_cluster("heal")
                        phase, text = "ended", await scenario.play(context)
            except Exception as error:  # noqa: BLE001 - the program continues; viewers and the log are informed
                phase, text = "failed", f"The scenario failed: {describe(error)}."
                expected = isinstance(error, RocketError | TimeoutError | OSError)
                _log.warning("scenario %s: %s", scenario.name, text, exc_info=not expected)
            finally:
                self._restoring = True
                if not self._exiting:
                    if failures := await self._restore(routing, rate):
                        phase, text = "failed", " ".join((text, *failures))
                    context.report(text, phase)
                    _log.info("scenario %s %s: %s", scenario.name, phase, text)

    async def _restore(self, routing: Routing, rate: float | None) -> list[str]:
        """Restore each thing even if another one fails; return a sentence for each failure."""
        failures = []
        try:
            if (why := await _failure_of(self._controls.command_cluster("heal"))) is not None:
                failures.append(f"Not every node is healed: {why}. Please heal all again.")
            if await _failure_of(self._restore_routing(routing)) is not None:
                failures.append(f"Reads are routed by '{self._router.routing}', not '{routing}' as before.")
        finally:
            if self._targets.simulator is not None:
                self._controls.set_rate(rate)
        return failures

    async def _restore_routing(self, routing: Routing) -> None:
        """Restore the routing as soon as the primary answers; raise `TimeoutError`."""
        async with asyncio.timeout(_ROUTING_TIMEOUT_S):
            while True:
                with contextlib.suppress(Unavailable):
                    await self._controls.set_routing(routing)
                    return
                await asyncio.sleep(_RETRY_S)


async def _failure_of(work: Awaitable[object]) -> str | None:
    """Do a part of restoring; return why it failed, or None."""
    try:
        await work
    except Exception as error:  # noqa: BLE001 - the other parts are restored all the same
        expected = isinstance(error, RocketError | TimeoutError)
        _log.warning("not everything is as before the scenario: %s", describe(error), exc_info=not expected)
        return describe(error)
    return None
