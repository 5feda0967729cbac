"""The dashboard and the alert rules go with what `/metrics` tells, as promtool and a look at the names see it.

That is part of Debian's package prometheus. `.ci/run` fetches it, and sets PROMTOOL_REQUIRED so that nothing is
skipped there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rocket.health import Code

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp import web
    from aiohttp.test_utils import TestClient

    from rocket.routing.observer import Observer

    Client: TypeAlias = TestClient[web.Request, web.Application]

DOCS = Path(__file__).parent.parent.parent / "docs"
ALERTS = DOCS / "prometheus" / "alerts.yml"
DASHBOARD = DOCS / "grafana" / "rocket.json"
PROMTOOL = shutil.which("promtool")

needs_promtool = pytest.mark.skipif(
    PROMTOOL is None and not os.environ.get("PROMTOOL_REQUIRED"),
    reason="promtool is not there; Debian has it in the package prometheus",
)

SUFFIXES = {"counter": ("_total",), "histogram": ("", "_bucket", "_count", "_sum"), "gauge": ("",)}


def promtool(*arguments: str | Path, stdin: str = "") -> str:
    """Run promtool, which has to find nothing wrong; return what it says."""
    assert PROMTOOL is not None
    done = subprocess.run(  # noqa: S603
        [PROMTOOL, *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def panels() -> Iterator[dict[str, object]]:
    """Yield each panel of the dashboard that shows something."""
    dashboard = json.loads(DASHBOARD.read_text())
    yield from (panel for panel in dashboard["panels"] if panel["type"] != "row")


def expressions() -> list[str]:
    """Return what the dashboard's panels ask for, with its variables replaced as Grafana would."""
    found = []
    for panel in panels():
        for target in panel["targets"]:  # type: ignore[attr-defined] # as Grafana has it
            expression = target["expr"]
            for variable, value in (
                ("$__rate_interval", "1m"),
                ("$__range", "30m"),
                ("$job", ".*"),
                ("$instance", ".*"),
            ):
                expression = expression.replace(variable, value)
            found.append(expression)
    return found


def test_every_panel_says_what_it_shows() -> None:
    """And each asks the data source that was chosen."""
    sources = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"] == sources
    assert len({str(panel["title"]) for panel in panels()}) == len(list(panels()))


@pytest.mark.parametrize(
    "source", [ALERTS, ALERTS.with_name("alerts_test.yml"), DASHBOARD], ids=lambda path: path.name
)
async def test_whatever_is_asked_for_is_there(client: Client, source: Path) -> None:
    """A metric that is renamed takes its panels and alerts along."""
    text = await (await client.get("/metrics")).text()
    metrics = {
        family.name + suffix
        for family in text_string_to_metric_families(text)
        for suffix in SUFFIXES.get(family.type, ("",))
    }
    asked = set(re.findall(r"\b(?:rocket|process)_\w+", source.read_text()))
    assert asked
    assert asked - metrics == set()


def test_what_health_finds_is_left_out_by_its_code_alone() -> None:
    """A code that is renamed, or new, has an alert."""
    left_out = re.search(r'code!~"([^"]+)"', ALERTS.read_text())
    assert left_out is not None
    left = set(Code) - set(left_out[1].split("|")) - {Code.PRIMARY_SILENT}
    assert len(left) == len(Code) - 1 - len(left_out[1].split("|"))
    assert left == {Code.PRIMARY_READ_ONLY, Code.REPLICA_UNFIT, Code.NODE_CLOSED, Code.NODE_REFUSED}


def test_the_alerts_are_tested() -> None:
    """Each is seen to fire, and but for those that tell of an event, not to."""
    alerts = set(re.findall(r"alert: (\w+)", ALERTS.read_text()))
    tests = ALERTS.with_name("alerts_test.yml").read_text()
    assert alerts == set(re.findall(r"alertname: (\w+)\n +exp_alerts", tests))
    assert alerts == set(re.findall(r"alertname: (\w+)}", tests))


@needs_promtool
@pytest.mark.parametrize(
    "arguments", [("check", "rules", ALERTS), ("test", "rules", ALERTS.with_name("alerts_test.yml"))]
)
def test_the_alerts_do_what_they_are_for(arguments: tuple[str | Path, ...]) -> None:
    """Each fires when it must, says what it should, and is silent when all is well."""
    assert "SUCCESS" in promtool(*arguments)


@needs_promtool
def test_the_dashboard_asks_what_prometheus_understands(tmp_path: Path) -> None:
    """Each expression is one, with the variables filled in."""
    rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(expressions())]
    file = tmp_path / "rules.json"  # any JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


@needs_promtool
async def test_the_metrics_are_named_as_they_should_be(client: Client, observer: Observer, email: str) -> None:
    """The tool has nothing to say of the live text, with everything in it that there may be."""
    await client.post("/users", json={"email": email})
    await client.get("/rides", headers={"Authorization": email})
    await observer.run_once()
    assert promtool("check", "metrics", stdin=await (await client.get("/metrics")).text()) == ""
