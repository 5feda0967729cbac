"""Spans of a service whose asyncpg is instrumented by OpenTelemetry: those of its reads and writes, and no others.

Needs OpenTelemetry's SDK and its instrumentation of asyncpg; `.ci/run` installs them, and sets WEB_REQUIRED so
that nothing is skipped there.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rocket import Answer, Role, Router, Unavailable
from tests.support.servers import dsns, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rocket.cluster.cluster import LocalCluster

OPERATIONS = Path(__file__).parent.parent.parent / "docs" / "operations.md"


def is_there(module: str) -> bool:
    """Return whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


MISSING = [name for name in ("opentelemetry.sdk", "opentelemetry.instrumentation.asyncpg") if not is_there(name)]
pytestmark = pytest.mark.skipif(
    bool(MISSING) and not os.environ.get("WEB_REQUIRED"),
    reason=f"{', '.join(MISSING)} not installed: uv sync --group web",
)


class Traces:
    """What was traced, in memory."""

    def __init__(self) -> None:
        trace: Any = importlib.import_module("opentelemetry.trace")
        sdk: Any = importlib.import_module("opentelemetry.sdk.trace")
        export: Any = importlib.import_module("opentelemetry.sdk.trace.export")
        in_memory: Any = importlib.import_module("opentelemetry.sdk.trace.export.in_memory_span_exporter")
        asyncpg: Any = importlib.import_module("opentelemetry.instrumentation.asyncpg")
        self._exporter = in_memory.InMemorySpanExporter()
        provider = sdk.TracerProvider()
        provider.add_span_processor(export.SimpleSpanProcessor(self._exporter))
        trace.set_tracer_provider(provider)
        self.tracer = trace.get_tracer("test")
        self._instrumentor = asyncpg.AsyncPGInstrumentor()

    @contextlib.contextmanager
    def instrumented(self) -> Iterator[None]:
        """Have asyncpg's statements make spans, in the body."""
        self._exporter.clear()
        self._instrumentor.instrument()
        try:
            yield
        finally:
            self._instrumentor.uninstrument()

    def spans(self) -> list[Any]:
        """Return the spans that have ended since this was last called."""
        spans = list(self._exporter.get_finished_spans())
        self._exporter.clear()
        return spans


@pytest.fixture(scope="module")
def traces() -> Traces:
    """What the process traces from now on: it takes one provider only."""
    return Traces()


def recipe() -> str:
    """Return the hooks that the documentation shows."""
    (code,) = re.findall(
        r"```python\n((?:(?!```).)*on_read\.append.*?)```", OPERATIONS.read_text(encoding="utf-8"), re.DOTALL
    )
    return str(code)


@pytest.mark.parametrize("late", [False, True])
async def test_the_observers_statements_make_no_spans(
    cluster: LocalCluster, traces: Traces, *, late: bool
) -> None:
    """Nor does opening connections, whether asyncpg was instrumented before the router was opened, or after it."""
    heard: list[object] = []
    with contextlib.ExitStack() as stack:
        if not late:
            stack.enter_context(traces.instrumented())
        async with await Router.open(dsns(cluster), observer_interval_s=0.01) as router:
            if late:
                stack.enter_context(traces.instrumented())
            router.board.on_status.append(heard.append)
            await until(lambda: len(heard) > 30)
            await until(lambda: any(pool.idle for pool in router.pools))
            assert [] == [span.attributes for span in traces.spans()]
            await router.session().read(lambda db: db.execute("SELECT 'of work'"))
            assert "SELECT 'of work'" in {span.attributes["db.statement"] for span in traces.spans()}


async def test_spans_of_reads_and_writes_name_node_role_and_reason(cluster: LocalCluster, traces: Traces) -> None:
    """By the hooks that the documentation shows, in the trace of the request that reads or writes."""
    async with await Router.open(dsns(cluster)) as router:
        exec(recipe(), {"router": router})  # noqa: S102 - what is ours
        with traces.instrumented(), traces.tracer.start_as_current_span("GET /") as request:
            session = router.session()
            await session.write(lambda db: db.execute("SELECT 'of work'"))
            await session.read(lambda db: db.execute("SELECT 'of work'"))
            answer = session.last
            for pool in router.pools:
                await router.remove(pool.name)
            with pytest.raises(Unavailable):
                await session.read(lambda db: db.execute("SELECT 'of work'"))
    spans = traces.spans()
    assert {request.get_span_context().trace_id} == {span.context.trace_id for span in spans}
    written, read, failed = [span for span in spans if span.name.startswith("rocket ")]
    assert "rocket write" == written.name
    assert {"rocket.node": "primary", "rocket.role": Role.PRIMARY, "rocket.reason": "write"} == written.attributes
    assert isinstance(answer, Answer)
    assert {
        "rocket.node": answer.node,
        "rocket.role": answer.role,
        "rocket.reason": answer.reason,
    } == read.attributes
    assert 0 < read.end_time - read.start_time < 60e9
    assert ["exception"] == [event.name for event in failed.events]
