"""The house plan, held: imports run one way, and each room keeps its promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import rocket

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(rocket.__file__).parent
SCHEMA = PACKAGE.parent / "schema.sql"
MODULES = sorted(PACKAGE.rglob("*.py"))

LONGEST_MODULE = 400
"""Lines; a longer one holds more than one noun."""


class Room(NamedTuple):
    """What the modules of one room may import."""

    of_rocket: tuple[str, ...]
    """Modules and packages of rocket, each with all below it; a name of `rocket` itself stands like a module."""
    never: tuple[str, ...] = ()
    """Modules of others, or of rocket, that are refused even so."""


PUBLIC = tuple(f"rocket.{name}" for name in rocket.__all__)

JUDGING = tuple(
    f"rocket.lab.torture.{name}"
    for name in (
        "answers",
        "checker",
        "debts",
        "figures",
        "goals",
        "history",
        "outages",
        "owed",
        "promotions",
        "reader",
        "report",
        "rides",
        "sufficiency",
        "tokens",
        "verdict",
    )
)
"""What judges a torture run knows its history alone, and nothing of what ran."""

SHOWING = tuple(f"rocket.lab.status.{name}" for name in ("members", "overview", "report"))
"""What shows a running system knows what was said of it, and asks nobody."""

ROOMS = {
    # At the bottom.
    "rocket.errors": Room(()),
    "rocket.dsn": Room(()),
    "rocket.lab.values": Room(()),
    "rocket.lab.settings": Room(
        ("rocket.errors", "rocket.dsn", "rocket.topology.patroni_addresses", "rocket.lab.values")
    ),
    "rocket.consistency": Room(
        ("rocket.consistency", "rocket.errors"),
        never=("asyncio", "asyncpg", "aiohttp", "uvloop", "time", "datetime", "random", "threading"),
    ),
    "rocket.lab.request_id": Room(()),
    "rocket.lab.logs": Room(("rocket.errors", "rocket.lab.request_id")),
    "rocket.lab.shutdown": Room(("rocket.errors",)),
    "rocket.lab.loop": Room(()),
    "rocket.lab.text": Room(()),
    "rocket.schema": Room(()),
    # What knows a database.
    "rocket.cluster": Room(("rocket.errors", "rocket.cluster"), never=("aiohttp",)),
    "rocket.routing": Room(
        ("rocket.errors", "rocket.dsn", "rocket.consistency", "rocket.routing"), never=("aiohttp",)
    ),
    # The public face, and what stands before it.
    "rocket.health": Room(("rocket.consistency", "rocket.routing"), never=("aiohttp", "prometheus_client")),
    "rocket.metrics": Room(
        (
            "rocket.__version__",
            "rocket.errors",
            "rocket.consistency",
            "rocket.routing",
            "rocket.health",
            "rocket.metrics",
        ),
        never=("aiohttp",),
    ),
    "rocket": Room(("rocket.errors", "rocket.lab.settings", "rocket.consistency", "rocket.routing")),
    "rocket.web": Room((*PUBLIC, "rocket.web")),
    "rocket.web.asgi": Room((*PUBLIC, "rocket.web"), never=("aiohttp", "starlette", "fastapi")),
    "rocket.lab.api": Room(
        (*PUBLIC, "rocket.health", "rocket.metrics", "rocket.lab.request_id", "rocket.web", "rocket.lab.api")
    ),
    "rocket.lab.simulator": Room(("rocket.lab.settings",), never=("asyncpg",)),
    "rocket.lab.listeners": Room(("rocket.errors", "rocket.lab.settings", "rocket.cluster.directories")),
    "rocket.lab.inspector": Room(
        (
            *PUBLIC,
            "rocket.errors",
            "rocket.consistency",
            "rocket.cluster",
            "rocket.routing.explain",
            "rocket.lab.api",
            "rocket.lab.simulator",
            "rocket.lab.shutdown",
            "rocket.lab.checker.history",
            "rocket.lab.inspector",
        )
    ),
    "rocket.topology.nodes_file": Room(
        (*PUBLIC, "rocket.dsn", "rocket.errors", "rocket.routing.admittance"), never=("aiohttp",)
    ),
    "rocket.lab.serving": Room(
        (
            *PUBLIC,
            "rocket.lab.api",
            "rocket.lab.shutdown",
            "rocket.lab.inspector",
            "rocket.topology.nodes_file",
            "rocket.topology.patroni",
            "rocket.topology.patroni_tls",
        )
    ),
    "rocket.lab.patroni": Room(
        (*PUBLIC, "rocket.errors", "rocket.dsn", "rocket.cluster", "rocket.lab.patroni"), never=("rocket.lab.cli",)
    ),
    "rocket.lab.workers": Room(
        (
            *PUBLIC,
            "rocket.errors",
            "rocket.lab.shutdown",
            "rocket.lab.loop",
            "rocket.lab.serving",
            "rocket.lab.logs",
            "rocket.cluster",
            "rocket.lab.workers",
        )
    ),
    # What puts them together.
    "rocket.lab.app": Room(("rocket",), never=("rocket.lab.cli", "rocket.__main__")),
    "rocket.lab.torture": Room(("rocket",), never=("rocket.lab.cli", "rocket.__main__")),
    "rocket.lab.bench": Room(("rocket",), never=("rocket.lab.cli", "rocket.__main__", "rocket.lab.torture")),
    "rocket.lab.status": Room(
        ("rocket",), never=("rocket.lab.cli", "rocket.__main__", "rocket.lab.torture", "rocket.lab.bench")
    ),
    **dict.fromkeys(
        SHOWING,
        Room(
            ("rocket.consistency", "rocket.lab.text", *SHOWING),
            never=("asyncio", "asyncpg", "aiohttp", "uvloop", "random", "threading"),
        ),
    ),
    **dict.fromkeys(
        JUDGING,
        Room(
            ("rocket.errors", "rocket.consistency", *JUDGING),
            never=("asyncio", "asyncpg", "aiohttp", "uvloop", "time", "random", "threading"),
        ),
    ),
    "rocket.lab.cli": Room(("rocket",)),
    "rocket.__main__": Room(("rocket",)),
}

MAY_READ_THE_ENVIRONMENT = {
    "rocket.lab.settings",
    "rocket.cluster.process",  # hands it on to the servers, and reads nothing of it
}


# --- the checkers ---


def module_name(path: Path) -> str:
    """Return the dotted name of a module of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> Room | None:
    """Return the room that a module stands in; the package's own `__init__` is a room by itself."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 1, -1)]
    return next((ROOMS[name] for name in names if name in ROOMS), ROOMS["rocket"] if module == "rocket" else None)


def imported(source: str, package: str) -> Iterator[str]:
    """Return the dotted name of everything imported: at the top, in functions, for type checkers, by text.

    `from a import b` counts as `a.b`, whether that is a module or a name in one; a relative import is resolved
    against `package`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in {"import_module", "__import__"}:
                match node.args:
                    case [ast.Constant(value=str(name)), *_]:
                        yield name
                    case _:
                        yield "a module that is known only as the program runs"


def within(name: str, place: str) -> bool:
    """Tell whether a dotted name is a place or lies below it."""
    return name == place or name.startswith(f"{place}.")


def forbidden_imports(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return what a module imports against the house plan."""
    room = room_of(module)
    if room is None:
        return [f"{module} has no room in the house plan"]
    package = module if is_package else module.rpartition(".")[0]
    return [
        name
        for name in imported(source, package)
        if any(within(name, place) for place in room.never)
        or (within(name, "rocket") and not any(within(name, place) for place in room.of_rocket))
        or " " in name
    ]


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


def test_the_house_is_not_empty() -> None:
    """The modules that are read are those of the package; every room of the plan has one."""
    names = {module_name(path) for path in MODULES}

    assert {"rocket", "rocket.consistency.lsn", "rocket.cluster.node", "rocket.lab.api.app"} <= names
    assert set(ROOMS) <= names


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_the_settings_read_the_environment(path: Path) -> None:
    """Whatever steers the program is a setting, with a flag and a line of help."""
    allowed = module_name(path) in MAY_READ_THE_ENVIRONMENT

    assert allowed or not reads_environment(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_module_is_too_long(path: Path) -> None:
    """One noun a module fits into so many lines."""
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
        ("rocket.errors", "from rocket import config", "rocket.lab.settings"),
        ("rocket.errors", "from . import config", "rocket.lab.settings"),
        ("rocket.lab.settings", "import rocket.lab.logs", "rocket.lab.logs"),
        ("rocket.consistency.board", "import time", "time"),
        ("rocket.consistency.board", "from asyncio import Lock", "asyncio.Lock"),
        ("rocket.consistency.lsn", "import asyncpg.exceptions", "asyncpg.exceptions"),
        ("rocket.consistency.choice", "from ..config import Settings", "rocket.lab.settings.Settings"),
        ("rocket.consistency", "from ..routing import router", "rocket.routing.router"),
        ("rocket.cluster.node", "from rocket.consistency import Lsn", "rocket.consistency.Lsn"),
        ("rocket.cluster.node", "from rocket import Lsn", "rocket.Lsn"),
        ("rocket.routing.router", "from rocket.cluster.node import Node", "rocket.cluster.node.Node"),
        ("rocket.routing.router", "from rocket.lab.settings import Settings", "rocket.lab.settings.Settings"),
        ("rocket.routing.router", "import rocket", "rocket"),
        ("rocket", "from rocket.lab.app import run_all", "rocket.lab.app.run_all"),
        ("rocket.lab.api.app", "from rocket.errors import Unavailable", "rocket.errors.Unavailable"),
        ("rocket.lab.api.app", "from rocket import errors", "rocket.errors"),
        ("rocket.lab.api.app", "from rocket import *", "rocket.*"),
        ("rocket.lab.api.app", "import rocket", "rocket"),
        ("rocket.lab.api.app", "from rocket.apiary import Bee", "rocket.apiary.Bee"),
        ("rocket.lab.simulator", "from rocket import Lsn", "rocket.Lsn"),
        ("rocket.lab.shutdown", "from rocket.lab.logs import configure", "rocket.lab.logs.configure"),
        ("rocket.lab.app", "from rocket import cli", "rocket.lab.cli"),
        ("rocket.lab.app", "from rocket.lab.cli import main", "rocket.lab.cli.main"),
        ("rocket.errors", "import os, rocket.lab.settings as harmless", "rocket.lab.settings"),
        ("rocket.errors", "try:\n    pass\nfinally:\n    import rocket.lab.settings", "rocket.lab.settings"),
        ("rocket.errors", "def late():\n    import rocket.lab.settings", "rocket.lab.settings"),
        (
            "rocket.errors",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rocket.lab.settings import Settings",
            "rocket.lab.settings.Settings",
        ),
        ("rocket.errors", "importlib.import_module('rocket.lab.settings')", "rocket.lab.settings"),
        ("rocket.errors", "__import__('rocket.lab.settings')", "rocket.lab.settings"),
        ("rocket.errors", "import_module(name)", "a module that is known only as the program runs"),
        (
            "rocket.lab.checker.check",
            "from rocket.lab.torture.nemesis import Nemesis",
            "rocket.lab.torture.nemesis.Nemesis",
        ),
        ("rocket.attic", "import os", "rocket.attic has no room in the house plan"),
    ],
)
def test_a_forbidden_import_is_caught(module: str, source: str, caught: str) -> None:
    """The checker finds an import wherever it stands and however it is written."""
    assert [caught] == forbidden_imports(source, module, is_package=module in {"rocket", "rocket.consistency"})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rocket.errors", "import os\nfrom __future__ import annotations"),
        ("rocket.errors", "import rocketry\nfrom rockets import rocket"),
        ("rocket.lab.settings", "from .errors import InvalidSetting"),
        ("rocket.consistency.choice", "from .board import Board"),
        ("rocket.consistency.choice", "import timeit"),
        (
            "rocket.lab.api.app",
            "from rocket import Router, Unavailable\nfrom rocket.lab.api import rides\nimport time",
        ),
        ("rocket.lab.app", "from rocket import Router, api, postgres\nfrom rocket.lab.settings import Settings"),
        ("rocket.lab.cli", "from rocket import orchestrator"),
        ("rocket.errors", "text = 'import rocket.lab.settings'  # import rocket.lab.settings"),
    ],
)
def test_an_allowed_import_is_let_through(module: str, source: str) -> None:
    """The checker does not cry wolf."""
    assert forbidden_imports(source, module) == []


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
