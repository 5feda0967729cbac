"""The documentation leads where it says, names all that can be asked for, and its first page stays short."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rocket import Limits, Reason
from rocket.health import Code
from rocket.lab import cli
from rocket.lab.bench import settings as bench_settings
from rocket.lab.settings import Settings, flag
from rocket.lab.status import command as status_command
from rocket.lab.torture import settings as torture_settings
from rocket.lab.torture.faults import FAULTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]

LONGEST_README = 20_000
"""Bytes: more is what the pages are for."""
LONGEST_LINE = 115

_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:")
"""How an address begins that is not a place in here."""
_LINK = re.compile(r"\[[^][]*(?:\[[^][]*\][^][]*)*\]\(([^()\s]+)\)")
_NOT_IN_ANCHORS = re.compile(r"[^\w\- ]")


# --- the reader of pages ---


def prose(text: str) -> Iterator[str]:
    """Yield the lines of a page that are not in a block of code."""
    fence = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fence = not fence
        elif not fence:
            yield line


def links(text: str) -> list[str]:
    """Return where a page's links and pictures lead; what stands in code is none."""
    return _LINK.findall(re.sub(r"`[^`]*`", "`code`", "\n".join(prose(text))))


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    for line in prose(text):
        if heading := re.fullmatch(r"#{1,6} +(.*?) *#*", line):
            words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading[1])
            anchor = _NOT_IN_ANCHORS.sub("", words.lower()).replace(" ", "-")
            found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
            seen[anchor] += 1
    return found


def broken(text: str, page: Path) -> list[str]:
    """Return the links of a page that lead nowhere."""
    return [link for link in links(text) if not _ELSEWHERE.match(link) and not _leads_somewhere(link, text, page)]


def _leads_somewhere(link: str, text: str, page: Path) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if path.startswith("/") or not target.is_relative_to(ROOT) or not target.exists():
        return False
    return not anchor or anchor in anchors(text if target == page else target.read_text(encoding="utf-8"))


def read(name: str) -> str:
    """Return the text of a page below docs."""
    return (DOCS / name).read_text(encoding="utf-8")


# --- the pages as they are ---


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    """Each relative link names a file that is there, and each anchor one of its headings."""
    assert [] == broken(page.read_text(encoding="utf-8"), page)


def test_the_readme_is_short() -> None:
    """A newcomer reads it to its end."""
    assert README.stat().st_size < LONGEST_README


def test_the_readme_leads_to_every_page() -> None:
    """No page is known only to those who look into the directory."""
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(links(README.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_wrapped(page: Path) -> None:
    """A line of prose fits beside another window; tables and code are as wide as they are."""
    lines = prose(page.read_text(encoding="utf-8"))

    assert [] == [line for line in lines if len(line) > LONGEST_LINE and not line.startswith("|")]


def test_the_figures_are_the_same_everywhere() -> None:
    """The tables of what the guarantee costs are in the README, and on the page that explains them."""
    _, _, costs = README.read_text(encoding="utf-8").partition("\n## What it costs\n")
    rows = [line for line in costs.partition("\n## ")[0].splitlines() if line.startswith("|")]

    assert 15 == len(rows)
    assert set(rows) <= set(read("benchmarks.md").splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_examples_import_is_there(page: Path) -> None:
    """Each piece of Python can be read by Python, and imports of rocket only what it has."""
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "rocket":
                module = importlib.import_module(str(node.module))
                assert [] == [each.name for each in node.names if not hasattr(module, each.name)]


# --- they name all that there is ---


def test_every_setting_is_in_the_reference() -> None:
    """Each flag stands in one row with the variable that does the same."""
    rows = [line for line in read("reference.md").splitlines() if line.startswith("|")]
    settings = [(flag(each.name), each.metadata["env"]) for each in fields(Settings) if each.metadata]
    missing = [
        name
        for name, env in settings
        if not any(re.search(rf"`{name}\b", row) and f"`{env}`" in row for row in rows)
    ]

    assert len(settings) > 20
    assert [] == missing


@pytest.mark.parametrize(
    ("command", "add_arguments"),
    [
        ("status", status_command.add_arguments),
        ("torture", torture_settings.add_arguments),
        ("bench", bench_settings.add_arguments),
    ],
)
def test_every_flag_is_in_the_reference(
    command: str, add_arguments: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Each flag of a command is in the section that has its name."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    flags = set(re.findall(r"--[a-z-]+", parser.format_usage()))
    section = read("reference.md").partition(f"\n## {command}\n")[2].partition("\n## ")[0]

    assert len(flags) > 4
    assert set() == flags - set(re.findall(r"--[a-z-]+", section))


def test_every_command_of_the_cluster_is_in_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever can be done to a node is there to be found."""
    with pytest.raises(SystemExit):
        cli.cluster_main(["--help"])
    commands = set(re.findall(r"^    ([a-z]+)  ", capsys.readouterr().out, re.MULTILINE))
    section = read("reference.md").partition("\n## cluster\n")[2].partition("\n## ")[0]

    assert {"up", "pause", "promote"} <= commands
    assert set() == {command for command in commands if not re.search(rf"`[^`]*\b{command}\b", section)}


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("routing.md", list(Reason)),
        ("operations.md", list(Code)),
        ("reference.md", list(FAULTS)),
        ("library.md", [each.name for each in fields(Limits)]),
    ],
)
def test_every_name_is_explained(page: str, names: list[str]) -> None:
    """Reasons, health's codes, faults and limits are words that people look up."""
    assert [] == [name for name in names if f"`{name}`" not in read(page)]


# --- the checkers catch what they are for ---


@pytest.mark.parametrize(
    "link",
    ["docs/nowhere.md", "docs/routing.md#nowhere", "#nowhere", "/docs/routing.md", "../elsewhere.md", "#code"],
)
def test_a_broken_link_is_caught(link: str) -> None:
    """A file that is not there, an anchor that is not, and a heading that is none because it is code."""
    text = f"# Title\n\n```sh\n# code\n```\n\nSee [this\nplace]({link}).\n"

    assert [link] == broken(text, README)


@pytest.mark.parametrize(
    "text",
    [
        "[page](docs/routing.md)",
        "[section](docs/routing.md#reasons)",
        "# The `HTTP` API's *end*, at last!\n\n[here](#the-http-apis-end-at-last)",
        "## Again\n\n## Again\n\n[first](#again) [second](#again-1)",
        "![picture](docs/inspector.png)",
        "[elsewhere](https://example.com/nowhere#at-all)",
        "`[code](nowhere.md)`",
        "```text\n[code](nowhere.md)\n```",
    ],
)
def test_a_good_link_is_let_through(text: str) -> None:
    """The checker does not cry wolf."""
    assert [] == broken(text, README)
