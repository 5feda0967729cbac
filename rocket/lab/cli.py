"""The command line: `python -m rocket`, and what `cluster.py` does."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rocket import __version__
from rocket.cluster import control
from rocket.cluster.faults import NODE_COMMANDS
from rocket.dsn import PRIMARY
from rocket.errors import RocketError, SetupError
from rocket.lab import app, logs
from rocket.lab import settings as run_settings
from rocket.lab.bench import settings as bench_settings
from rocket.lab.loop import run
from rocket.lab.status import settings as status_settings
from rocket.lab.text import NOTHING, aligned
from rocket.lab.torture import settings as torture_settings
from rocket.schema import script

if TYPE_CHECKING:
    from collections.abc import Sequence

ResultT = TypeVar("ResultT")

FAILED, WRONG_USE = 1, 2
"""Exit codes: a part of the system failed; what was asked for cannot be had."""
WRONG_USE_OF_JUDGES = 64
"""The same as WRONG_USE for the commands in `_JUDGES`; 0, 2 and 3 are their verdicts (`Judgement`)."""

_JUDGES = {"check", "torture"}
"""Commands that end with a verdict."""

_CLUSTER = (
    "Run a local Postgres cluster, or act on one that runs (also inside run-all). Exit codes: 0 done, or ended as "
    "asked; 1 it could not be done, or a server cannot be kept alive; 2 wrong use, or no such cluster."
)
_RUN_ALL_EPILOG = """\
Each setting also comes from the environment, or from a line of .env, by the name in brackets; a flag goes before
both. Times are like 20ms, 5s or 2min; a number alone is seconds.

example: three replicas on any free ports, 50 rides a second, for a minute
  python -m rocket run-all --replicas 3 --postgres-port 0 --api-port 0 --simulator-rate 50 --duration 1min

exit codes: 0 it ended as asked, by a signal or --duration; 1 a part failed, or the simulator saw a stale read;
2 what was asked for cannot be had
"""
_COLUMNS = ("name", "role", "state", "pid", "port", "timeline", "lsn", "lag_bytes", "receiver", "replay")

_log = logging.getLogger("rocket.run")


class _CommandParser(argparse.ArgumentParser):
    """Refuses what it does not know with its own usage; argparse leaves that to whoever has the commands."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m rocket ...` and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="rocket" if Path(sys.argv[0]).name == "rocket" else "python -m rocket",
        description="Reads from Postgres replicas that are guaranteed never stale.",
    )
    parser.add_argument("--version", action="version", version=f"rocket {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser)
    run_all = commands.add_parser(
        "run-all",
        help="run cluster, API, observer and simulator",
        description="Run the whole system: a cluster of its own (or one that is there), API, observer, simulator.",
        epilog=_RUN_ALL_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = run_all.add_argument_group("parts")
    for part in ("cluster", "API", "observer", "simulator"):
        parts.add_argument(f"--no-{part.lower()}", action="store_true", help=f"leave out the {part}")
    run_settings.add_arguments(run_all)
    status_settings.add_arguments(
        commands.add_parser(
            "status",
            help="show the members of a running system, and who answers its reads",
            description="Show the members of a running system, as its API and its cluster tell of them. "
            "Exit codes: 0 shown; 1 there is none; 2 wrong use.",
        )
    )
    _add_cluster_commands(
        commands.add_parser(
            "cluster", help="run a cluster by itself, or act on one that runs", description=_CLUSTER
        )
    )
    check = commands.add_parser(
        "check",
        help="judge the history of a torture run",
        description="Judge a torture run by its history. Exit codes: 0 held, 2 violated, 3 void, 64 wrong use.",
    )
    check.add_argument("file", metavar="FILE", type=Path, help="what torture recorded")
    check.add_argument("--json", action="store_true", help="as JSON")
    torture_settings.add_arguments(
        commands.add_parser(
            "torture",
            help="bring faults upon a cluster of its own under traffic, record it, and judge the record",
            description="Bring faults upon a cluster of its own, on free ports, while clients write and read by "
            "HTTP; then judge what they saw. Exit codes: 0 held, 2 violated, 3 void, 64 wrong use.",
        )
    )
    bench_settings.add_arguments(
        commands.add_parser(
            "bench",
            help="measure what the guarantee costs, against other routings on the same cluster",
            description="Measure what the guarantee costs, on a cluster of its own, on free ports: each routing "
            "in turn, by the API in a process of its own. Exit codes: 0 measured, whatever it says; 1 a part "
            "failed, or a read of never-stale was stale; 2 wrong use.",
        )
    )
    schema = commands.add_parser(
        "schema",
        help="print the SQL that makes rocket's own tables in your database",
        description="Print the SQL for rocket's own tables, to be run on the primary by psql: "
        "all of it, or none where a table of somebody else's has such a name. Harmless to apply again.",
    )
    schema.add_argument("--role", metavar="NAME", help="with the grants that rocket's role needs")
    schema.add_argument(
        "--demo", action="store_true", help="with the tables of the demonstration, users and rides"
    )
    given = _parsed(parser, sys.argv[1:] if arguments is None else arguments)
    return _COMMANDS[given.command](given)


def _print_schema(given: argparse.Namespace) -> int:
    print(script(given.role, demonstration=given.demo), end="")
    return 0


def _show_status(given: argparse.Namespace) -> int:
    from rocket.lab.status.command import show  # noqa: PLC0415 - run-all starts faster without

    return _guarded(lambda: show(given))


def _measure(given: argparse.Namespace) -> int:
    from rocket.lab.bench.command import measure  # noqa: PLC0415 - the same

    return _guarded(lambda: measure(given))


def _judge(given: argparse.Namespace) -> int:
    from rocket.lab.torture.command import judge, torture_and_judge  # noqa: PLC0415 - the same

    if given.command == "check":
        return _guarded(lambda: judge(given.file, as_text=not given.json), WRONG_USE_OF_JUDGES)
    return _guarded(lambda: torture_and_judge(given), WRONG_USE_OF_JUDGES)


def _run_all(given: argparse.Namespace) -> int:
    parts = app.Parts(
        cluster=not given.no_cluster,
        api=not given.no_api,
        observer=not given.no_observer,
        simulator=not given.no_simulator,
    )
    return _guarded(lambda: _long_running(given, lambda settings: app.run_all(settings, parts)))


def cluster_main(arguments: Sequence[str] | None = None) -> int:
    """Run `python cluster.py ...`, which is `rocket cluster ...`, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python cluster.py", description=_CLUSTER)
    _add_cluster_commands(parser)
    return _on_cluster(parser.parse_args(arguments))


def _add_cluster_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(
        dest="cluster_command", required=True, metavar="COMMAND", parser_class=_CommandParser
    )

    def command(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")

    up = command("up", "run a cluster in the foreground until Ctrl-C")
    run_settings.add_arguments(up, cluster_only=True)
    up.add_argument(
        "--patroni", action="store_true", dest="by_patroni",
        help="have it run by Patroni and etcd: three members, or one more than --replicas",
    )  # fmt: skip
    status = command("status", "show the nodes of a running cluster")
    status.add_argument("--json", action="store_true", help="as JSON")
    which = [
        status,
        command("down", "end a running cluster, and the program that runs it"),
        command("heal", "undo all that was done to the nodes: everything back to normal"),
    ]
    env = command("env", 'print where the nodes are, for eval "$(python cluster.py env)"')
    env.add_argument("--tcp", action="store_true", help="by TCP, with the password, rather than by socket")
    which.append(env)
    on_nodes: dict[str, argparse.ArgumentParser] = {}
    for each in NODE_COMMANDS.values():
        if each.flag_of:
            flag = f"--{each.name.removeprefix(f'{each.flag_of}-')}"
            on_nodes[each.flag_of].add_argument(flag, action="store_true", help=each.help)
            continue
        on_nodes[each.name] = command(each.name, each.help)
        on_nodes[each.name].add_argument("node", metavar="NODE", help="primary, replica0, ...")
        if each.takes:
            on_nodes[each.name].add_argument(each.takes, metavar="MS", type=int, help="milliseconds")
    which += on_nodes.values()
    for one in which:
        one.add_argument("--data-dir", metavar="DIR", help="the running cluster's data directory")
        one.add_argument("--postgres-port", metavar="P", help="a port of the running cluster")


def _on_cluster(given: argparse.Namespace) -> int:
    """Run a cluster, or do what is asked to one that runs; return the exit code."""
    if given.cluster_command == "up":
        up_and_on = app.run_patroni if given.by_patroni else app.run_cluster
        return _guarded(lambda: _long_running(given, up_and_on))
    return _guarded(lambda: run(_act(given)))


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; where an exit code of 2 would be a verdict, wrong use ends with another."""
    try:
        return parser.parse_args(arguments)
    except SystemExit as end:
        command = next((argument for argument in arguments if not argument.startswith("-")), None)
        if end.code == WRONG_USE and command in _JUDGES:
            raise SystemExit(WRONG_USE_OF_JUDGES) from None
        raise


def _guarded(act: Any, wrong_use: int = WRONG_USE) -> int:
    """Turn what went wrong into one line and an exit code."""
    try:
        return int(act())
    except SetupError as error:
        print(f"rocket: {error}", file=sys.stderr)
        return wrong_use
    except RocketError as error:
        print(f"rocket: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:  # before or after the event loop
        return FAILED


def _long_running(given: argparse.Namespace, run_all: Any) -> int:
    settings = run_settings.load(given)
    logs.configure(settings.log_format)
    return int(run(run_all(settings)))


_COMMANDS = {
    "run-all": _run_all,
    "cluster": _on_cluster,
    "schema": _print_schema,
    "status": _show_status,
    "bench": _measure,
    "torture": _judge,
    "check": _judge,
}


async def _act(given: argparse.Namespace) -> int:
    settings = run_settings.load(given)
    run_dir = control.find(settings.data_dir, settings.port_asked_for)
    if given.cluster_command == "env":
        by_tcp = given.tcp or not os.access(run_dir / "s", os.X_OK)
        print(_exports((await control.ask(run_dir, "addresses", by_tcp=by_tcp))["nodes"]))
        return 0
    details = {name: value for name, value in vars(given).items() if name in {"node", "delay_ms", "backend"}}
    said = await control.ask(run_dir, given.cluster_command, **details)
    if given.cluster_command != "status":
        print(said)
    elif given.json:
        print(json.dumps(said, indent=2))
    else:
        print("\n".join(_table(said)))
    return 0


def _exports(nodes: dict[str, str]) -> str:
    """Return what a shell has to evaluate so that programs find these nodes."""
    primary = nodes.pop(PRIMARY)
    replicas = " ".join(f"{name}={dsn}" for name, dsn in nodes.items())
    return f"export ROCKET_PRIMARY={shlex.quote(primary)} ROCKET_REPLICAS={shlex.quote(replicas)}"


def _table(nodes: list[dict[str, Any]]) -> list[str]:
    rows = [list(_COLUMNS)]
    for node in nodes:
        delayed = f"{node['delay_ms']} ms late" if node["delay_ms"] else ""
        replay = "paused" if node["paused"] else delayed
        cells = {**node, "replay": replay} | ({"receiver": "cut"} if node["cut"] else {})
        rows.append([NOTHING if cells[column] in {None, ""} else str(cells[column]) for column in _COLUMNS])
    return aligned(rows)
