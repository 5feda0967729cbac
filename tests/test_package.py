"""The package as others get it: built, installed away from the checkout, and used there.

Needs uv, and pyright for its part; `.ci/run` has them, and sets PACKAGE_REQUIRED and PYRIGHT_REQUIRED so that
nothing is skipped there.
"""

from __future__ import annotations

import ast
import email
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shutil
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import aiohttp
import mypy.api
import pytest
import pytest_asyncio

import rocket
import rocket.health
import rocket.metrics
import rocket.web.aiohttp
import rocket.web.asgi
from rocket.lab import cli
from tests.support.program import ROOT, Program, assert_nothing_left, servers, spawned
from tests.support.servers import fresh_dir
from tests.web.test_readme import service

if TYPE_CHECKING:
    import contextlib
    from collections.abc import AsyncIterator, Iterator
    from types import ModuleType

REQUIRED = bool(os.environ.get("PACKAGE_REQUIRED"))
UV = shutil.which("uv") or "uv"
needs_uv = pytest.mark.skipif(shutil.which("uv") is None and not REQUIRED, reason="there is no uv on the PATH")

needs_pyright = pytest.mark.skipif(
    importlib.util.find_spec("pyright") is None and not os.environ.get("PYRIGHT_REQUIRED"),
    reason="pyright not installed: uv sync --group types",
)

DEADLINE_S = 60.0
SERVICE = ROOT / "tests" / "web" / "service.py"
USERS_SCRIPT = """\
from rocket import Lsn
from rocket.consistency import SessionToken
floor: Lsn = SessionToken.parse("1~1-abcdefghij~0/16B3748~0/0").write_floor
print(floor)
"""


MISTAKES = {
    "    session = request[SESSION]": "    session: Router = request[SESSION]",
    "return session_of(request)\n": "return session_of(request).token\n",
    "found = await session.read(finding(note))": "found: int = await session.read(finding(note))",
    "last = session.last\n": "last: Answer[str] = session.last\n",
    "functools.partial(add, words)": 'functools.partial(add, "words")',
    'opened("notes")': "opened(Limits())",
    "note = answer.value": "note: str = answer.value",
    "Limits(read_s=2.0": 'Limits(read_s="2"',
    "on_read.append(note_slow)": "on_read.append(note_invalid)",
    "    row = await db.fetchrow(f": "    row: int = await db.fetchrow(f",
}
"""Right and wrong, by lines of `tests/web/service.py`."""


class Built(NamedTuple):
    """What `uv build` makes."""

    wheel: Path
    sdist: Path


class Installed:
    """A fresh environment that has the wheel and its dependencies, and nothing else."""

    def __init__(self, home: Path) -> None:
        self.home = home
        """A directory to work in, with no checkout above it."""
        self.python = home / "env" / "bin" / "python"

    def running(self, *arguments: str) -> contextlib.AbstractAsyncContextManager[Program]:
        """Run the command `rocket`; it does not outlive the context."""
        return away(self.home, str(self.python.with_name("rocket")), *arguments)

    async def says(self, *arguments: str) -> str:
        """Run `rocket`, which has to succeed; return what it printed."""
        async with self.running(*arguments) as program:
            assert 0 == await program.ends(), program.output
            return program.output

    async def prints(self, code: str) -> str:
        """Run a piece of Python, which has to succeed; return what it printed."""
        exit_code, output = await done(self.home, str(self.python), "-c", code)
        assert 0 == exit_code, output
        return output


def away(cwd: Path, *command: str) -> contextlib.AbstractAsyncContextManager[Program]:
    """Run a command that knows nothing of the checkout, with `cwd`/tmp for temporary files."""
    (cwd / "tmp").mkdir(exist_ok=True)
    ours = ("ROCKET_", "PYTHON", "VIRTUAL_ENV", "UV_PROJECT")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"TMPDIR": str(cwd / "tmp"), "PYTHONUNBUFFERED": "1"}
    return spawned(*command, cwd=cwd, env=environment)


async def done(cwd: Path, *command: str) -> tuple[int, str]:
    """Run a command to its end; return exit code and output."""
    async with away(cwd, *command) as program:
        return await program.ends(DEADLINE_S), program.output


async def install(home: Path, wheel: Path, extra: str = "", *others: str) -> Installed:
    """Install a wheel, and others, into a new environment, from uv's cache if that holds all it needs."""
    code, output = await done(
        ROOT, UV, "export", "--all-groups", "--no-emit-project", "--no-hashes", "-q", "-o", str(home / "known")
    )
    assert 0 == code, output
    code, output = await done(home, UV, "venv", "-q", "--python", sys.executable, str(home / "env"))
    assert 0 == code, output
    into = (
        UV, "pip", "install", "-q", "--python", str(home / "env"), "-c", str(home / "known"), f"{wheel}{extra}",
        *others,
    )  # fmt: skip
    code, output = await done(home, *into, "--offline")
    if code:
        code, output = await done(home, *into)
    assert 0 == code, output
    return Installed(home)


@pytest_asyncio.fixture(scope="module")
async def built() -> AsyncIterator[Built]:
    """The sdist, and the wheel that is built from it."""
    with fresh_dir() as home:
        code, output = await done(ROOT, UV, "build", "-q", "--out-dir", str(home))
        assert 0 == code, output
        (wheel,), (sdist,) = home.glob("*.whl"), home.glob("*.tar.gz")
        yield Built(wheel, sdist)


@pytest_asyncio.fixture(scope="module")
async def library(built: Built) -> AsyncIterator[Installed]:
    """The package as a service installs it, without an extra."""
    with fresh_dir() as home:
        yield await install(home, built.wheel)


@pytest_asyncio.fixture(scope="module")
async def lab(built: Built) -> AsyncIterator[Installed]:
    """The package with all that its commands need."""
    with fresh_dir() as home:
        yield await install(home, built.wheel, "[lab]")


@pytest_asyncio.fixture(scope="module")
async def services(built: Built) -> AsyncIterator[Installed]:
    """The package and the frameworks of two services: the README's, and a larger one, without asyncpg's stubs."""
    with fresh_dir() as home:
        installed = await install(home, built.wheel, "[aiohttp,metrics]", "fastapi")
        (home / "notes.py").write_text(service())
        shutil.copy(SERVICE, home)
        yield installed


@pytest.fixture(scope="session")
def mypy_cache(pytestconfig: pytest.Config) -> Path:
    """Where mypy keeps what it knows of the standard library and of frameworks, also for the next run."""
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("mypy")


@needs_uv
async def test_the_library_brings_asyncpg_alone(library: Installed) -> None:
    """What a service that routes its reads installs; modules without input and output need not even that."""
    every = "from importlib.metadata import distributions; print(*sorted(each.name for each in distributions()))"
    assert "asyncpg rocket-replicas\n" == await library.prints(every)
    used = "import rocket, rocket.consistency, rocket.errors, sys; print('asyncpg' in sys.modules)"
    assert "False\n" == await library.prints(used)
    await library.prints("import rocket.routing.router, rocket.health, rocket.web.asgi")
    await library.prints("import rocket\nfor name in rocket.__all__: getattr(rocket, name)")


@needs_uv
@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (("run-all",), 2),
        (("cluster", "up"), 2),
        (("cluster", "pause", "replica0"), 2),
        (("status",), 2),
        (("bench",), 2),
        (("torture",), 64),
        (("check", "history"), 64),
    ],
)
async def test_a_command_whose_extra_is_missing_names_it(
    library: Installed, arguments: tuple[str, ...], exit_code: int
) -> None:
    """In one line, without a traceback; the exit code is that of wrong use."""
    async with library.running(*arguments) as program:
        code, output = await program.ends(), program.output
    assert exit_code == code
    assert re.fullmatch(rf"rocket: {arguments[0]} needs \w+: pip install '{cli.DISTRIBUTION}\[lab\]'\n", output)


@needs_uv
async def test_the_tables_need_no_extra(library: Installed) -> None:
    """The library does not work without them; the help needs none either."""
    assert "CREATE TABLE IF NOT EXISTS epochs" in await library.says("schema")
    assert "run-all" in await library.says("--help")
    assert "--replicas" in await library.says("run-all", "--help")


@needs_uv
async def test_metadata_is_fit_for_an_index_and_is_not_uploaded_by_mistake(library: Installed) -> None:
    """A name of its own, and no link that leads nowhere there."""
    code = "import importlib.metadata as m; print(m.distribution('rocket-replicas').metadata.as_string())"
    metadata = email.message_from_string(await library.prints(code))
    assert cli.DISTRIBUTION == metadata["Name"]
    assert "Private :: Do Not Upload" in metadata.get_all("Classifier", [])
    assert {"aiohttp", "cluster", "lab", "metrics"} <= set(metadata.get_all("Provides-Extra", []))
    assert "import rocket" in str(metadata.get_payload())
    assert [] == re.findall(r"\]\((?!https:)", str(metadata.get_payload()))


@needs_uv
async def test_what_is_built_holds_what_is_no_code(built: Built) -> None:
    """Tables, page and types are in the wheel; the sdist has the tests and `cluster.py`, too."""
    with zipfile.ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
    page = {f"rocket/lab/inspector/page/{path.name}" for path in (ROOT / "rocket/lab/inspector/page").iterdir()}
    assert {"rocket/py.typed", "rocket/schema.sql", *page} <= names
    assert not any(name.startswith("tests/") for name in names)
    with tarfile.open(built.sdist) as sdist:
        of_sdist = {name.partition("/")[2] for name in sdist.getnames()}
    assert {
        "cluster.py",
        "schema.sql",
        "README.md",
        "tests/test_package.py",
        "docs/inspector.png",
        "docs/routing.md",
    } <= of_sdist


@needs_uv
async def test_it_prints_its_version(built: Built, library: Installed) -> None:
    """The command and the module print that of the wheel's name."""
    version = f"rocket {built.wheel.name.split('-')[1]}\n"
    assert version == f"rocket {rocket.__version__}\n"
    assert version == await library.says("--version")
    assert (0, version) == await done(library.home, str(library.python), "-m", "rocket", "--version")


@needs_uv
async def test_types_are_seen_by_a_script_that_uses_it(library: Installed, mypy_cache: Path) -> None:
    """A script of three lines passes the strictest check against what is installed, and does what it says."""
    script = library.home / "script.py"
    script.write_text(USERS_SCRIPT)
    assert (0, "0/16B3748\n") == await done(library.home, str(library.python), str(script))
    checker = (sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(mypy_cache))
    code, output = await done(library.home, *checker, "--python-executable", str(library.python), str(script))
    assert 0 == code, output
    script.write_text(
        USERS_SCRIPT.replace("floor: Lsn", "floor: bytes")
    )  # its size differs: mypy looks at whole seconds
    code, output = await done(library.home, *checker, "--python-executable", str(library.python), str(script))
    assert (1, True) == (code, 'variable has type "bytes"' in output), output


@pytest.mark.long
def test_services_are_typed_with_stubs(mypy_cache: Path) -> None:
    """Where asyncpg's stubs are installed, what rocket says fits them."""
    if not REQUIRED:
        pytest.importorskip("fastapi")
    said, complaints, code = mypy.api.run(["--strict", "--cache-dir", str(mypy_cache), str(SERVICE)])
    assert 0 == code, said + complaints


def checker(name: str, installed: Installed, mypy_cache: Path) -> tuple[str, ...]:
    """Return the command that checks what is written against what is installed."""
    if name == "pyright":
        return (sys.executable, "-m", "pyright", "--pythonpath", str(installed.python))
    options = ("--strict", "--cache-dir", str(mypy_cache), "--python-executable", str(installed.python))
    return (sys.executable, "-m", "mypy", *options)


checked = pytest.mark.parametrize("name", ["mypy", pytest.param("pyright", marks=needs_pyright)])


@pytest.mark.long
@needs_uv
@checked
async def test_services_are_typed_without_stubs(services: Installed, mypy_cache: Path, name: str) -> None:
    """That of the README, and a larger one, as strictly as it can be."""
    code, output = await done(services.home, *checker(name, services, mypy_cache), "notes.py", SERVICE.name)
    assert 0 == code, output


@pytest.mark.long
@needs_uv
@checked
async def test_what_is_wrong_with_a_services_types_is_found(
    services: Installed, mypy_cache: Path, name: str
) -> None:
    """Each mistake, where it is made: nothing that rocket gives out is of any type whatever."""
    text = SERVICE.read_text()
    for right, wrong in MISTAKES.items():
        assert 1 == text.count(right), right
        text = text.replace(right, wrong)
    (services.home / "wrong.py").write_text(text)
    code, output = await done(services.home, *checker(name, services, mypy_cache), "wrong.py")
    assert 1 == code, output
    found = {int(number) for number in re.findall(r"wrong\.py:(\d+):.*\berror\b", output)}
    made = {
        number for number, line in enumerate(text.splitlines(), 1) if any(w in line for w in MISTAKES.values())
    }
    assert set() == made - found, output


@needs_uv
async def test_the_main_job_runs_where_it_is_installed(lab: Installed) -> None:
    """As the README has it, but for the ports."""
    flags = ("--replicas", "1", "--postgres-port", "0", "--api-port", "0", "--duration", "3")
    assert " 0 stale reads" in await lab.says("run-all", *flags)
    assert_nothing_left(lab.home / "tmp")


@needs_uv
async def test_cluster_and_api_run_where_it_is_installed(lab: Installed) -> None:
    """A cluster by itself, disturbed by name; the API on it, with its page; and nothing is left."""
    where = ("--data-dir", str(lab.home / "data"))
    async with lab.running("cluster", "up", "--replicas", "1", "--postgres-port", "0", *where) as cluster:
        await cluster.prints("Ctrl-C ends it")
        await lab.says("cluster", "pause", "replica0", *where)
        nodes = {node["name"]: node for node in json.loads(await lab.says("cluster", "status", "--json", *where))}
        assert {"primary", "replica0"} == nodes.keys()
        assert nodes["replica0"]["paused"]
        await lab.says("cluster", "resume", "replica0", *where)
        flags = ("--no-cluster", "--no-simulator", "--api-port", "0", "--duration", "3")
        async with lab.running("run-all", *flags, *where) as program:
            url = (await program.prints(r"ready after .* (http://\S+)"))[1]
            await uses(url)
            assert 0 == await program.ends(), program.output
        await lab.says("cluster", "down", *where)
        assert 0 == await cluster.ends(), cluster.output
    assert [] == servers(lab.home)
    assert_nothing_left(lab.home / "tmp")


async def uses(url: str) -> None:
    """Write a ride, read it back, and look at the page."""
    async with aiohttp.ClientSession(url) as http:
        async with http.post("/users", json={"email": "you@example.com"}) as response:
            assert 201 == response.status
        headers = {"Authorization": "you@example.com"}
        async with http.post("/rides", json={"distance": 7}, headers=headers) as response:
            ride = await response.json()
            headers["Rocket-Session"] = response.headers["Rocket-Session"]
        async with http.get(f"/rides/{ride['id']}", headers=headers) as response:
            assert ride == await response.json()
        async with http.get("/inspector") as response:
            page = await response.text()
        for name in re.findall(r'(?:src|href)="([^"#:]+)"', page):
            async with http.get(f"/inspector/{name}" if "/" not in name else name) as response:
                assert 200 == response.status, name


# --- its documentation ---


MODULES = (rocket, rocket.health, rocket.metrics, rocket.web, rocket.web.aiohttp, rocket.web.asgi)
"""What `.ci/run` makes the documentation of."""


def public(module: ModuleType) -> list[str]:
    """Return the names that a module gives out, or defines for others."""
    given_out: list[str] = getattr(module, "__all__", [])
    return given_out or [
        name
        for statement in ast.parse(inspect.getsource(module)).body
        for name in defined(statement)
        if not name.startswith("_") and not isinstance(getattr(module, name), TypeVar)
    ]


def defined(statement: ast.stmt) -> list[str]:
    """Return the names that a statement gives a meaning."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement.name]
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def documented(module: ModuleType, name: str) -> dict[str, str | None]:
    """Return the docstring of a public name and of whatever is public in it."""
    value: Any = getattr(module, name)
    if inspect.isfunction(value):
        return {name: value.__doc__}
    if not inspect.isclass(value) or not value.__module__.startswith("rocket."):
        return {name: said_of_constant(name)}
    inside = {
        f"{name}.{member}": getattr(what, "__func__", what).__doc__
        for member, what in vars(value).items()
        if not member.startswith("_")
        and (callable(what) or isinstance(what, property | classmethod | staticmethod))
    }
    return {name: value.__doc__, **inside, **said_of_fields(value)}


def said_of_fields(kind: type) -> dict[str, str | None]:
    """Return what stands below each public field of a class; a named tuple has a docstring for them otherwise."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    return {
        f"{kind.__name__}.{name}": said_below(following)
        for statement, following in itertools.zip_longest(body.body, body.body[1:])
        if isinstance(statement, ast.AnnAssign)
        for name in defined(statement)
        if not name.startswith("_")
    }


def said_below(statement: ast.stmt | None) -> str | None:
    """Return what a statement says, if it is nothing but a text."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return str(statement.value.value)
    return None


def said_of_constant(name: str) -> str | None:
    """Return what stands below a constant, or an alias, where it is defined."""
    for path in Path(rocket.__file__).parent.rglob("*.py"):
        for block in blocks(ast.parse(path.read_text())):
            for assigned, said in itertools.pairwise(block):
                if name in defined(assigned) and (text := said_below(said)) is not None:
                    return text
    return None


def blocks(module: ast.Module) -> Iterator[list[ast.stmt]]:
    """Yield what stands at the top of a module, also under an `if`."""
    yield module.body
    for statement in module.body:
        if isinstance(statement, ast.If):
            yield from (statement.body, statement.orelse)


def test_public_names_are_what_type_checkers_see() -> None:
    """Each is imported when it is first used, from where the static import says that it is."""
    (static,) = (each for each in ast.parse(inspect.getsource(rocket)).body if isinstance(each, ast.If))
    names: dict[str, ModuleType] = {}
    for statement in static.body:
        assert isinstance(statement, ast.ImportFrom)
        names |= {each.name: importlib.import_module(str(statement.module)) for each in statement.names}
    assert sorted(rocket.__all__) == sorted(names)
    for name, module in names.items():
        assert getattr(module, name) is getattr(rocket, name)
    assert set(names) <= set(dir(rocket))
    assert not hasattr(rocket, "Observer")


@pytest.mark.parametrize(
    ("module", "name"),
    [pytest.param(module, name, id=f"{module.__name__}.{name}") for module in MODULES for name in public(module)],
)
def test_public_names_are_documented(module: ModuleType, name: str) -> None:
    """Each says what it is for, and so do its methods, properties and fields."""
    silent = [where for where, said in documented(module, name).items() if not (said or "").strip()]
    assert [] == silent


def test_the_documentation_is_made_of_all_that_is_public() -> None:
    """What a service imports has a page."""
    script = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"pdoc ((?:rocket[\w.]*\s)+)", script)
    assert {module.__name__ for module in MODULES} == set(command.split())
