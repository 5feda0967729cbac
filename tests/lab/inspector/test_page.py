"""The inspector's page in a real browser, on a whole system: it moves, and its buttons do what they say.

One system, one browser and, at the width of a desktop, one page serve all tests. Page and system are reset after
each test. They need playwright and an installed Chromium; `.ci/run` installs both, and sets BROWSER_REQUIRED so
that none is skipped there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from tests.support.inspected import HEADERS
from tests.support.program import running
from tests.support.servers import fresh_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Browser, ConsoleMessage, Page

REQUIRED = bool(os.environ.get("BROWSER_REQUIRED"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SOON_MS = 15_000
PROMOTED_MS = 40_000
RATE = 60
"""Rides a second."""
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


def _reason_to_skip() -> str | None:
    try:
        import playwright  # noqa: F401, PLC0415
    except ImportError:
        return "playwright is not installed: uv sync --group browser"
    return None if CHROMIUM else "there is no Chromium on the PATH"


MISSING = _reason_to_skip()
pytestmark = pytest.mark.skipif(MISSING is not None and not REQUIRED, reason=MISSING or "")


class Visit:
    """An open page, and what went wrong on it."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address
        self.complaints: list[str] = []
        self.hosts: Counter[str] = Counter()
        page.on("console", self._take)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.hosts.update([request.url.split("/")[2]]))

    def _take(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)

    async def open(self) -> None:
        """Load the page and wait until it shows something."""
        await self.page.goto(self.address)
        await self.until("() => rocketInspector.events > 50 && rocketInspector.store.tick")

    async def reset(self) -> None:
        """Undo what was done to the view and to the system."""
        await self.page.unroute_all()
        await self.page.evaluate(
            """() => {
                for (const id of ["playing-close", "live"]) document.getElementById(id).click();
                for (const way of document.querySelectorAll("#legend [aria-pressed=false]")) way.click();
                for (const toast of document.querySelectorAll("#toasts button")) toast.click();
                document.activeElement.blur();
                rocketInspector.view.span = 10000;
                scrollTo(0, 0);
            }"""
        )
        for command in ({"command": "heal"}, {"command": "simulator", "rate": RATE}):
            answer = await self.page.request.post(f"{self.address}/control", data=command, headers=HEADERS)
            assert answer.ok, await answer.text()
        self.complaints.clear()

    def assert_no_complaints(self) -> None:
        """Assert that the browser's console is empty, and that the page has used no other host."""
        assert [] == self.complaints
        assert {self.address.split("/")[2]} == set(self.hosts)

    async def reads(self) -> dict[str, int]:
        """Return the number of reads that each node has served by the last tick."""
        reads: dict[str, int] = await self.page.evaluate("() => rocketInspector.store.tick.reads")
        return reads

    async def until(self, condition: str, argument: object = None, timeout_ms: float = SOON_MS) -> None:
        """Wait until a JavaScript function returns true on the page."""
        await self.page.wait_for_function(condition, arg=argument, timeout=timeout_ms)

    def button(self, node: str, command: str) -> Any:
        """Return a button of a node's card."""
        return self.page.locator(f"article[data-node='{node}'] button[data-command='{command}']")

    async def becomes_primary(self, name: str, before: str) -> None:
        """Wait until the cards show one node as the primary, and another one as a replica."""
        badge = "document.querySelector(`article[data-node='${name}'] .badge`).innerText"
        await self.until(
            f"(roles) => Object.entries(roles).every(([name, role]) => {badge} === role)",
            {name: "primary", before: "replica"},
            timeout_ms=PROMOTED_MS,
        )


@pytest_asyncio.fixture(scope="module")
async def system() -> AsyncIterator[str]:
    """Run the whole system with three replicas and traffic; yield the address of the page."""
    assert MISSING is None, MISSING
    with fresh_dir() as kept_dir:
        flags = ("--replicas", "3", "--postgres-port", "0", "--api-port", "0", "--simulator-rate", f"{RATE}")
        async with running(kept_dir, "-m", "rocket", "run-all", *flags) as program:
            match = await program.prints(r"inspector: (http://\S+)")
            yield match[1]
            program.process.send_signal(signal.SIGINT)  # servers of a killed program would outlive it for a moment
            await program.ends()  # with 1 if its simulator came across a stale read of the guided race


@pytest_asyncio.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    """A browser for all tests."""
    assert MISSING is None, MISSING
    from playwright.async_api import async_playwright  # noqa: PLC0415

    async with async_playwright() as playwright:
        # Chromium's own sandbox does not work for root, the user in CI.
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        await browser.close()


@contextlib.asynccontextmanager
async def visiting(browser: Browser, address: str, size: dict[str, int]) -> AsyncIterator[Visit]:
    """Open the page in a profile of its own."""
    page = await browser.new_page(viewport=size, color_scheme="light")  # type: ignore[arg-type]
    try:
        yield Visit(page, address)
    finally:
        await page.close()


@pytest_asyncio.fixture(scope="module")
async def desktop(browser: Browser, system: str) -> AsyncIterator[Visit]:
    """Open the page at the width of a desktop."""
    async with visiting(browser, system, WIDE) as visit:
        await visit.open()
        yield visit


@pytest_asyncio.fixture
async def visit(desktop: Visit) -> AsyncIterator[Visit]:
    """The page at the width of a desktop; it and the system are reset afterwards."""
    try:
        yield desktop
        desktop.assert_no_complaints()
    finally:
        await desktop.reset()


async def test_the_diagram_moves_until_it_is_paused(visit: Visit) -> None:
    """Events continue to arrive while it is paused."""
    canvas = visit.page.locator("#canvas")
    before, right = await canvas.screenshot(), await visit.page.evaluate("() => rocketInspector.view.right")
    held = await visit.page.evaluate("() => rocketInspector.events")
    await visit.until("(held) => rocketInspector.events > held + 100 && rocketInspector.fps > 10", held)
    assert before != await canvas.screenshot()
    assert right < await visit.page.evaluate("() => rocketInspector.view.right")
    await visit.page.locator("#stage").press("Space")
    right = await visit.page.evaluate("() => rocketInspector.view.right")
    await visit.until("(held) => rocketInspector.events > held + 200", held)
    assert right == await visit.page.evaluate("() => rocketInspector.view.right")


async def test_a_replica_that_is_paused_falls_behind_and_reads_leave_it(visit: Visit) -> None:
    """By the button on its card, and back by the same button."""
    pause = visit.button("replica2", "pause")
    await pause.click()
    card = "document.querySelector(\"article[data-node='replica2']\")"
    await visit.until(f"() => {card}.querySelector('[data-command=pause]').ariaPressed === 'true'")
    await visit.until(f"() => {card}.querySelector('[data-value=behind]').innerText.endsWith('kB')")
    before = await visit.reads()
    await visit.until(
        "(before) => ['replica0', 'replica1'].every("
        "name => rocketInspector.store.tick.reads[name] > before[name] + 30)",
        before,
    )
    after = await visit.reads()
    assert after["replica2"] - before["replica2"] < 10
    await pause.click()
    await visit.until("(before) => rocketInspector.store.tick.reads.replica2 > before + 20", after["replica2"])


async def test_the_guided_race_is_stale_as_published_and_not_under_never_stale(visit: Visit) -> None:
    """Every stale read that the checker finds was routed as published."""
    await visit.page.locator("button[data-scenario='race']").click()
    await visit.until(
        "() => /^article: .* never-stale: 0 of [1-9]\\d* reads stale/.test("
        "document.querySelector('#playing.ended #playing-words')?.innerText)",
        timeout_ms=PROMOTED_MS,
    )
    await visit.until("() => rocketInspector.store.tick.stale_by_routing.article > 0")
    stale = await visit.page.evaluate("() => rocketInspector.store.tick.stale_by_routing")
    assert 0 == stale.get("never-stale", 0)
    assert "0" == await visit.page.locator("[data-testid='stale-count']").inner_text()
    assert 8 == await visit.page.locator("button[data-read]").count()
    first = visit.page.locator("button[data-read]").first
    await first.click()
    await visit.until("() => document.querySelector('#card').innerText.includes('Floor')")


async def test_the_card_of_a_read_says_what_it_asked_for(visit: Visit) -> None:
    """And where its floor came from: it waited for an answer of the primary, or has it from its token."""
    api = visit.address.removesuffix("/inspector")
    user = {"Authorization": "asks@example.com"}
    await visit.page.request.post(f"{api}/users", data={"email": "asks@example.com"})
    written = await visit.page.request.post(f"{api}/rides", data={"distance": 1.5}, headers=user)
    ride = (await written.json())["id"]
    for sent, words in (
        ({"Rocket-Freshness": "global"}, "the primary's flush LSN, asked after it began"),
        ({"Rocket-Session": written.headers["rocket-session"]}, "from its token"),
    ):
        last = await visit.page.evaluate("() => rocketInspector.store.reads.tail")
        await visit.page.request.get(f"{api}/rides/{ride}", headers=user | sent)
        await visit.until(
            """([ride, from]) => {
                const { store, jump } = rocketInspector;
                for (let row = from; row < store.reads.tail; row++) {
                    const record = store.record(store.reads, row);
                    if (record?.ride !== ride || record.kind !== "read") continue;
                    jump({...record, read: record.id});
                    return true;
                }
                return false;
            }""",
            [ride, last],
        )
        await visit.until("(words) => document.querySelector('#card').innerText.includes(words)", words)
        asked = sent.get("Rocket-Freshness", "session")
        shown = await visit.page.locator("#card dl").first.inner_text()
        assert f"{asked}: " in shown
        await visit.page.locator("#live").click()


async def test_a_scenario_leaves_room_for_what_it_shows(visit: Visit) -> None:
    """Its description appears once, no other one is open, and its progress is shown above the diagram."""
    other = visit.page.locator("#scenario-list summary").last
    await other.click()
    assert 1 == await visit.page.locator("#scenario-list details[open]").count()
    card = visit.page.locator(".scenario", has=visit.page.locator("[data-scenario='stampede']"))
    await visit.page.evaluate("() => scrollTo(0, document.body.scrollHeight)")
    await card.locator("button").click()
    await visit.until(  # the page also shows a scenario that ended before
        "(title) => document.querySelector('#playing.ended #playing-title')?.innerText === title",
        "Many reads right after one write",
        timeout_ms=PROMOTED_MS,
    )
    assert "0 of 40 reads stale" in await visit.page.locator("#playing").inner_text()
    assert ["Many reads right after one write"] == await visit.page.locator(
        "#scenario-list details[open] h3"
    ).all_inner_texts()
    assert 1 == (await card.inner_text()).count("Forty reads ask for a ride")
    await visit.until("() => document.querySelector('#stage').getBoundingClientRect().top > -1")
    await visit.page.locator("#playing-close").click()
    assert await visit.page.locator("#playing").is_hidden()


async def test_back_to_live_restores_the_scale(visit: Visit) -> None:
    """However often the diagram has zoomed to a read meanwhile."""
    await visit.page.locator("#zoom-out").click()
    before = await visit.page.evaluate("() => rocketInspector.view.span")
    for _ in range(2):
        await visit.page.evaluate(
            "() => { const { view } = rocketInspector; view.show(view.now - 5, view.now, 24); }"
        )
        assert 24 == await visit.page.evaluate("() => rocketInspector.view.span")
    await visit.page.locator("#live").click()
    assert (before, True) == tuple(
        await visit.page.evaluate("() => [rocketInspector.view.span, rocketInspector.view.following]")
    )


async def test_the_keyboard_reaches_what_was_believed_of_a_node(visit: Visit) -> None:
    """Lane by lane, at the time of the current event."""
    stage = visit.page.locator("#stage")
    await stage.press("ArrowRight")
    at = await visit.page.evaluate("() => rocketInspector.diagram.pinned.to")
    titles = set()
    for _ in range(4):
        await stage.press("Shift+ArrowDown")
        assert at == await visit.page.evaluate("() => rocketInspector.diagram.pinned.to")
        titles.add(await visit.page.locator("#card h3").inner_text())
    assert {"primary", "replica0", "replica1", "replica2"} == titles
    await stage.press("ArrowRight")
    assert "lane" != await visit.page.evaluate("() => rocketInspector.diagram.pinned.kind")
    assert at <= await visit.page.evaluate("() => rocketInspector.diagram.pinned.to")


async def test_the_keyboard_reaches_another_incarnation_of_a_replica(visit: Visit) -> None:
    """It is an unusual event."""
    before = await visit.page.evaluate("() => rocketInspector.store.nodes[2].incarnations.length")
    await visit.button("replica1", "kill-backend").click()
    await visit.until("(before) => rocketInspector.store.nodes[2].incarnations.length > before", before)
    stage = visit.page.locator("#stage")
    for way in await visit.page.locator("#legend button").all():
        await way.click()  # reads that waited are unusual, too
    await stage.press("Space")
    for _ in range(200):
        await stage.press("ArrowDown")
        if "another incarnation" in await visit.page.locator("#card h3").inner_text():
            break
    else:
        pytest.fail("no step led to it")
    await visit.until("() => rocketInspector.store.tick.states.replica1.state === 'up'")


async def test_a_cluster_of_another_program_has_no_controls(browser: Browser, system: str) -> None:
    """The page says why beside the buttons; it takes the timeline from the epoch's name."""
    hello = {
        "now": 1000, "zero": "2026-01-01T00:00:00Z", "nodes": ["primary", "replica0"], "routing": "never-stale",
        "controls": False, "no_controls": "No faults here.",
        "scenarios": [{"name": "race", "title": "A", "text": "B"}],
    }  # fmt: skip
    events = [
        {
            "id": 1, "kind": "replica", "t": 900, "name": "replica0", "replay_lsn": "0/10", "epoch": "3-abc",
            "incarnation": "1@2",
        },
        {"id": 2, "kind": "tick", "t": 950, "reads": {}, "stale_by_routing": {}, "checked": 0},
    ]  # fmt: skip
    body = f"event: hello\ndata: {json.dumps(hello)}\n\nevent: batch\ndata: {json.dumps(events)}\n\n"
    async with visiting(browser, system, WIDE) as visit:
        await visit.page.route(
            "**/inspector/events", lambda route: route.fulfill(content_type="text/event-stream", body=body)
        )
        await visit.page.goto(system)
        card = visit.page.locator("article[data-node='replica0']")
        await card.locator("[data-value=timeline]", has_text="3").wait_for()
        assert ("No faults here.", True) == (
            await visit.page.locator("#scenarios-note").inner_text(),
            await visit.page.locator("[data-scenario=race]").is_disabled(),
        )


async def test_names_are_short_and_are_not_taken_for_roles(visit: Visit) -> None:
    """A user without a session is named, and after a promotion a replica may be named 'primary'."""
    words = await visit.page.evaluate(
        """async () => {
            const { named, shortName } = await import("/inspector/format.js");
            const { flagOf } = await import("/inspector/paint-frame.js");
            const delay = { kind: "fault", name: "delay", node: "replica2" };
            return [shortName("user ada@example.com"), shortName("s12"), named("primary", "replica"),
                    named("primary", "primary"), named("replica2", "primary"), named("replica2", "replica"),
                    flagOf({ ...delay, delay_ms: 300 }), flagOf({ ...delay, delay_ms: 0 })];
        }"""
    )
    assert [
        "ada", "s12", "primary (now a replica)", "primary", "replica2 (the primary)", "replica2",
        "delay replica2", "no delay replica2",
    ] == words  # fmt: skip


async def test_the_page_fits_a_phone(browser: Browser, system: str) -> None:
    """No part of the page is wider than the screen, in light and in dark."""
    async with visiting(browser, system, PHONE) as visit:
        await visit.open()
        for scheme in ("light", "dark"):
            await visit.page.emulate_media(color_scheme=scheme)
            assert 0 == await visit.page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
        visit.assert_no_complaints()


async def test_the_speed_shown_is_the_current_one(visit: Visit) -> None:
    """Also after another one was refused; the slider begins with that of one client."""
    speed, shown = (
        visit.page.locator("#speed"),
        "(text) => document.querySelector('#speed-now').innerText === text",
    )
    await speed.press("Home")
    await visit.until(shown, "one client")
    await visit.until("() => !document.querySelector('#speed').ariaBusy")
    await speed.fill("7")
    await visit.until(shown, "50 rides/s")
    await visit.until("() => !document.querySelector('#speed').ariaBusy")
    refusal = {"status": 409, "json": {"error": "A scenario is going on."}}
    await visit.page.route("**/inspector/control", lambda route: route.fulfill(**refusal))
    await speed.press("End")
    await visit.until("() => document.querySelector('#toasts').innerText.includes('going on')")
    await visit.until(shown, "50 rides/s")
    assert "7" == await speed.input_value()
    visit.complaints.clear()  # the browser notes the 409


async def test_promotion_shows_a_new_primary(visit: Visit) -> None:
    """Its card says so, and the old primary's says that it follows; then that is promoted again."""
    await visit.button("replica0", "promote").click()
    await visit.becomes_primary("replica0", before="primary")
    await visit.until(
        """() => {
            const [old, promoted] = rocketInspector.store.nodes.map((node) => node.status);
            return old?.streaming && old.epoch === promoted?.epoch;
        }""",
        timeout_ms=PROMOTED_MS,
    )
    await visit.button("primary", "promote").click()
    await visit.becomes_primary("primary", before="replica0")
