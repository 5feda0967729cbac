"""The plan of the house, held: three wings, imports that run one way, no circle, and the field's words."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import rocket
from tests.support.house import ROOT, circles, imported, is_within, module_name, words_left_behind

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(rocket.__file__).parent
SCHEMA = ROOT / "schema.sql"
MODULES = sorted(PACKAGE.rglob("*.py"))

LONGEST_MODULE = 500
"""Lines; a longer file holds more than one noun."""
MOST_MODULES = 135


class Room(NamedTuple):
    """What the modules of one room may import."""

    of_rocket: tuple[str, ...]
    """Modules and packages of rocket, each with all below it; a name of `rocket` itself stands like a module."""
    of_others: tuple[str, ...] | None = None
    """Packages that are not of the standard library; None: any."""
    never: tuple[str, ...] = ()
    """Modules that are refused even so."""


PUBLIC = tuple(f"rocket.{name}" for name in rocket.__all__)
"""The names that `import rocket` gives: what the demonstration's API and the middlewares stand on."""

NO_INPUT_OUTPUT = ("asyncio", "socket", "subprocess", "threading", "time", "datetime", "random", "os")

ROOMS = {
    # The library: asyncpg alone, and nothing of the other two wings.
    "rocket.errors": Room((), ()),
    "rocket.dsn": Room(("rocket.errors",), ()),
    "rocket.schema": Room((), ()),
    "rocket.consistency": Room(("rocket.errors", "rocket.consistency"), (), never=NO_INPUT_OUTPUT),
    "rocket.routing": Room(("rocket.errors", "rocket.dsn", "rocket.consistency", "rocket.routing"), ("asyncpg",)),
    "rocket": Room(("rocket.errors", "rocket.dsn", "rocket.consistency", "rocket.routing"), ()),
    "rocket.health": Room(("rocket.consistency", "rocket.routing"), ()),
    "rocket.web": Room((*PUBLIC, "rocket.errors", "rocket.web"), ()),
    "rocket.web.aiohttp": Room((*PUBLIC, "rocket.errors", "rocket.web"), ("aiohttp",)),
    "rocket.metrics": Room(
        (
            "rocket.__version__",
            "rocket.errors",
            "rocket.consistency",
            "rocket.routing",
            "rocket.health",
            "rocket.metrics",
        ),
        ("prometheus_client",),
    ),
    "rocket.topology": Room(
        (*PUBLIC, "rocket.errors", "rocket.dsn", "rocket.routing", "rocket.topology"), ("asyncpg", "aiohttp")
    ),
    # A local cluster, which knows nothing of rides or routing.
    "rocket.cluster": Room(("rocket.errors", "rocket.cluster"), ("asyncpg", "psutil")),
    # The lab, which puts them together.
    "rocket.lab": Room(("rocket",), never=("rocket.__main__",)),
    "rocket.lab.api": Room(
        (
            *PUBLIC,
            "rocket.health",
            "rocket.metrics",
            "rocket.web",
            "rocket.lab.api",
            "rocket.routing.limits.Timeout",
            "rocket.lab.comparison",
            "rocket.lab.logs",
        )
    ),
    "rocket.lab.checker": Room(
        ("rocket.errors", "rocket.consistency", "rocket.lab.checker"), ("msgspec",), never=NO_INPUT_OUTPUT
    ),
    "rocket.lab.simulator": Room(
        ("rocket.consistency", "rocket.lab.client", "rocket.lab.settings"), never=("asyncpg",)
    ),
    "rocket.__main__": Room(("rocket.lab.cli",), ()),
}

MAY_READ_THE_ENVIRONMENT = {
    "rocket.dsn",  # `nodes_from_environment`
    "rocket.lab.settings",
    "rocket.cluster.process",  # hands it on to the servers, and reads nothing of it
}

# --- the checkers ---


def room_of(module: str) -> Room | None:
    """Return the room that a module stands in; the package's own `__init__` is a room by itself."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 1, -1)]
    return next((ROOMS[name] for name in names if name in ROOMS), ROOMS["rocket"] if module == "rocket" else None)


def forbidden_imports(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return what a module imports against the plan."""
    room = room_of(module)
    if room is None:
        return [f"{module} has no room in the plan"]
    package = module if is_package else module.rpartition(".")[0]
    return [name for name in imported(source, package) if not _is_allowed(name, room)]


def _is_allowed(name: str, room: Room) -> bool:
    if " " in name or any(is_within(name, place) for place in room.never):
        return False
    if is_within(name, "rocket"):
        return any(is_within(name, place) for place in room.of_rocket)
    return (
        room.of_others is None
        or name.partition(".")[0] in sys.stdlib_module_names
        or any(is_within(name, place) for place in room.of_others)
    )


def reads_environment(source: str) -> bool:
    """Tell whether a source names the environment in any way."""
    names = {"environ", "environb", "getenv", "getenvb", "load_dotenv", "dotenv_values"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            return True
        if isinstance(node, ast.ImportFrom) and names & {alias.name for alias in node.names}:
            return True
    return False


def without_comments_and_texts(sql: str) -> str:
    """Return SQL whose commas and brackets all have a meaning."""
    return re.sub(r"'(?:[^']|'')*'|--[^\n]*", lambda match: "''" if match[0][0] == "'" else "", sql)


def columns(sql: str) -> set[str]:
    """Return every column of every table, as `table.column`."""
    found = set()
    plain = without_comments_and_texts(sql)
    for table in re.finditer(r"CREATE TABLE (?:IF NOT EXISTS )?(\w+) \(", plain):
        for entry in entries(plain[table.end() :]):
            first = entry.split()[0]
            if first.upper() not in {"CONSTRAINT", "PRIMARY", "UNIQUE", "CHECK", "FOREIGN", "EXCLUDE", "LIKE"}:
                found.add(f"{table[1]}.{first}")
    for added in re.finditer(r"ALTER TABLE (\w+)\s+ADD COLUMN (?:IF NOT EXISTS )?(\w+)", plain):
        found.add(f"{added[1]}.{added[2]}")
    return found


def entries(sql: str) -> Iterator[str]:
    """Split what follows an opening bracket at its commas, up to the bracket that closes it."""
    depth, entry = 0, ""
    for sign in sql:
        if depth == 0 and sign in ",)":
            yield entry
            entry = ""
            if sign == ")":
                return
        else:
            depth += {"(": 1, ")": -1}.get(sign, 0)
            entry += sign


def commented(sql: str, kind: str) -> set[str]:
    """Return what carries a comment that says something: TABLE or COLUMN."""
    return set(re.findall(rf"COMMENT ON {kind} ([\w.]+)\s+IS\s+'[^']", sql))


# --- the house as it is ---


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    """No module imports from a room above its own, not even for the type checker or inside a function."""
    source = path.read_text(encoding="utf-8")

    assert forbidden_imports(source, module_name(path), is_package=path.name == "__init__.py") == []


def test_the_modules_read_are_those_of_the_package() -> None:
    """Every room of the plan has a module, and the wings are there."""
    names = {module_name(path) for path in MODULES}

    assert {"rocket", "rocket.consistency.lsn", "rocket.cluster.node", "rocket.lab.api.app"} <= names
    assert set(ROOMS) <= names


def test_no_imports_run_in_a_circle() -> None:
    """Not even those for the type checker."""
    assert [] == circles({module_name(path): path.read_text(encoding="utf-8") for path in MODULES})


def test_files_are_few_and_deep() -> None:
    """A file is a noun; the next one is found by its name."""
    assert len(MODULES) <= MOST_MODULES


TEXTS = sorted(
    path
    for pattern in ("rocket/**/*", "tests/**/*", "docs/**/*", "*.md", "*.py", "schema.sql")
    for path in ROOT.glob(pattern)
    if path.suffix in {".py", ".md", ".sql", ".html", ".js"} and path.name not in {"house.py", "test_house.py"}
)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_fields_words_are_used(path: Path) -> None:
    """No name and no line speaks the language that the house once had for itself."""
    assert [] == [str(word) for word in words_left_behind(path, path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_the_settings_read_the_environment(path: Path) -> None:
    """What steers the program is a setting, with a flag and a line of help."""
    allowed = module_name(path) in MAY_READ_THE_ENVIRONMENT

    assert allowed or not reads_environment(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_module_is_too_long(path: Path) -> None:
    """One noun fits into one file of this length."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE


def test_every_table_and_column_is_commented() -> None:
    """Whoever looks at a table in psql reads what each column is for, and no comment is for one that is gone."""
    sql = SCHEMA.read_text(encoding="utf-8")
    tables = {column.split(".")[0] for column in columns(sql)}

    assert {"users", "rides", "replica_statuses"} <= tables
    assert tables == commented(sql, "TABLE")
    assert columns(sql) == commented(sql, "COLUMN")


@pytest.mark.parametrize(
    "column",
    [
        "replica_statuses.id",
        "replica_statuses.last_lsn",
        "replica_statuses.name",
        "rides.created_at",
        "rides.distance",
        "rides.id",
        "rides.user_id",
        "users.email",
        "users.id",
        "users.min_lsn",
    ],
)
def test_the_tables_have_the_columns_of_the_system_they_descend_from(column: str) -> None:
    """What was written for that system's tables can be pointed at these."""
    assert column in columns(SCHEMA.read_text(encoding="utf-8"))


# --- the checkers catch what they are for ---


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("rocket.errors", "from rocket import dsn", "rocket.dsn"),
        ("rocket.errors", "from . import dsn", "rocket.dsn"),
        ("rocket.dsn", "import rocket.lab.logs", "rocket.lab.logs"),
        ("rocket.consistency.board", "import time", "time"),
        ("rocket.consistency.board", "from asyncio import Lock", "asyncio.Lock"),
        ("rocket.consistency.lsn", "import asyncpg.exceptions", "asyncpg.exceptions"),
        ("rocket.consistency.choice", "from ..routing import router", "rocket.routing.router"),
        ("rocket.routing.router", "from rocket.cluster.node import Node", "rocket.cluster.node.Node"),
        ("rocket.routing.router", "from rocket.lab.settings import Settings", "rocket.lab.settings.Settings"),
        ("rocket.routing.router", "import aiohttp", "aiohttp"),
        ("rocket.routing.router", "import rocket", "rocket"),
        ("rocket.web.asgi", "from starlette import applications", "starlette.applications"),
        ("rocket", "from rocket.lab.app import run_all", "rocket.lab.app.run_all"),
        ("rocket.cluster.node", "from rocket.consistency import Lsn", "rocket.consistency.Lsn"),
        ("rocket.cluster.node", "from rocket import Lsn", "rocket.Lsn"),
        ("rocket.lab.api.app", "from rocket.routing.router import Router", "rocket.routing.router.Router"),
        ("rocket.lab.api.app", "from rocket import errors", "rocket.errors"),
        ("rocket.lab.api.app", "from rocket import *", "rocket.*"),
        ("rocket.lab.api.app", "import rocket", "rocket"),
        ("rocket.lab.api.app", "from rocket.apiary import Bee", "rocket.apiary.Bee"),
        ("rocket.lab.simulator", "from rocket import Lsn", "rocket.Lsn"),
        ("rocket.errors", "import os, rocket.dsn as harmless", "rocket.dsn"),
        ("rocket.errors", "try:\n    pass\nfinally:\n    import rocket.dsn", "rocket.dsn"),
        ("rocket.errors", "def late():\n    import rocket.dsn", "rocket.dsn"),
        (
            "rocket.errors",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rocket.dsn import parse_dsn",
            "rocket.dsn.parse_dsn",
        ),
        ("rocket.errors", "importlib.import_module('rocket.dsn')", "rocket.dsn"),
        ("rocket.errors", "__import__('rocket.dsn')", "rocket.dsn"),
        ("rocket.errors", "import_module(name)", "a module that is known only as the program runs"),
        ("rocket.lab.checker.check", "from rocket.lab.torture.nemesis import N", "rocket.lab.torture.nemesis.N"),
        ("rocket.attic", "import os", "rocket.attic has no room in the plan"),
    ],
)
def test_a_forbidden_import_is_caught(module: str, source: str, caught: str) -> None:
    """The checker finds an import wherever it stands and however it is written."""
    assert [caught] == forbidden_imports(source, module, is_package=module in {"rocket", "rocket.consistency"})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rocket.errors", "import os\nfrom __future__ import annotations"),
        ("rocket.dsn", "from .errors import InvalidSetting"),
        ("rocket.consistency.choice", "from .board import Board"),
        ("rocket.consistency.choice", "import timeit"),
        (
            "rocket.lab.api.app",
            "from rocket import Router\nfrom rocket.lab.api import rides\nimport time",
        ),
        ("rocket.lab.app", "from rocket import Router\nfrom rocket.lab.settings import Settings\nimport aiohttp"),
        ("rocket.errors", "text = 'import rocket.dsn'  # import rocket.dsn"),
    ],
)
def test_an_allowed_import_is_let_through(module: str, source: str) -> None:
    """The checker does not cry wolf."""
    assert forbidden_imports(source, module) == []


def test_a_circle_is_found() -> None:
    """Of two modules that import each other, also where one does so for types alone."""
    sources = {
        "a": "from b import B",
        "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a",
        "c": "import a",
    }

    assert [["a", "b"]] == circles(sources)


@pytest.mark.parametrize(
    "text",
    [
        "must_reign = 1",
        "class Crowd: ...",
        "# whoever comes",
        '"""Tell whether it is so."""',
        "print('nobody is there')",
        "print(f'nobody is {there}')",
    ],
)
def test_a_word_of_the_list_is_found(text: str) -> None:
    """In names, comments, docstrings and messages."""
    assert words_left_behind(Path("some.py"), text)


@pytest.mark.parametrize("text", ["sovereign = 1", "# such as this", "x = 'no such node'", "# an incrowded word"])
def test_a_word_like_one_of_the_list_is_left_alone(text: str) -> None:
    """A part of a longer word is another word."""
    assert [] == words_left_behind(Path("some.py"), text)


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['HOME']",
        "import os as o\no.getenv('HOME')",
        "from os import environ",
        "def late():\n    from os import getenv as harmless",
        "import dotenv\ndotenv.dotenv_values()",
    ],
)
def test_a_look_at_the_environment_is_caught(source: str) -> None:
    """By whichever name it goes."""
    assert reads_environment(source)


def test_a_column_without_a_comment_is_caught() -> None:
    """Brackets, commas, comments and texts between the columns do not hide one."""
    sql = """
        CREATE TABLE IF NOT EXISTS pads (
            id   bigint PRIMARY KEY, -- a comment, with (a bracket
            size numeric(10, 2) CHECK (size IN (1, 2)),
            kind text DEFAULT 'a, ) b',
            CONSTRAINT once UNIQUE (id, kind)
        );
        ALTER TABLE pads ADD COLUMN IF NOT EXISTS late boolean;
        COMMENT ON TABLE pads IS 'Where rockets start.';
        COMMENT ON COLUMN pads.id IS 'Of no meaning.';
        COMMENT ON COLUMN pads.size IS '';
        COMMENT ON COLUMN pads.kind IS
            'One of two.';
    """

    assert {"pads"} == commented(sql, "TABLE")
    assert {"pads.size", "pads.late"} == columns(sql) - commented(sql, "COLUMN")
