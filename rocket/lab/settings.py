"""Settings: from flags, the environment, `.env` and defaults, in this order of precedence."""

from __future__ import annotations

import os
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dotenv

from rocket.dsn import PRIMARY, parse_dsn, parse_replicas
from rocket.errors import InvalidSetting
from rocket.lab.values import (
    MaxLag,
    parse_duration,
    parse_max_lag,
    parse_one_of,
    parse_path,
    parse_port,
    parse_rate,
    parse_replica_count,
    parse_text,
    parse_token,
    parse_wait,
    parse_worker_count,
    parse_yes_or_no,
)
from rocket.topology.patroni_addresses import parse_template, parse_urls

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping

ROUTINGS = ("never-stale", "article", "random", "primary")
LOG_FORMATS = ("text", "json")

_NODES = ("primary", "replica", "nodes_file")


def _setting(
    default: Any,
    env: str,
    read: Callable[[Any], Any],
    metavar: str,
    what: str,
    *,
    also_cluster: bool = False,
    secret: bool = False,
    repeated: bool = False,
) -> Any:
    metadata = {
        "env": env, "read": read, "metavar": metavar, "help": what, "cluster": also_cluster, "secret": secret,
        "repeated": repeated,
    }  # fmt: skip
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a run can be told. Each field is a flag of the same name."""

    replicas: int = _setting(
        5,
        "NUM_REPLICAS",
        parse_replica_count,
        "N",
        "how many replicas there are beside the primary",
        also_cluster=True,
    )
    postgres_port: int = _setting(
        5433, "POSTGRES_PORT", parse_port, "P",
        "the primary's port; replica i has P+1+i; 0: any free ones", also_cluster=True,
    )  # fmt: skip
    data_dir: Path | None = _setting(
        None, "ROCKET_DATA_DIR", parse_path, "DIR",
        "where the cluster is kept and used again; without it, it is temporary", also_cluster=True,
    )  # fmt: skip
    postgres_bin: Path | None = _setting(
        None, "ROCKET_POSTGRES_BIN", parse_path, "DIR",
        "Postgres programs (14 or newer) to use instead of those that come with rocket", also_cluster=True,
    )  # fmt: skip
    log_format: str = _setting(
        "text", "ROCKET_LOG_FORMAT", parse_one_of(*LOG_FORMATS), "FORMAT", "text or json", also_cluster=True
    )
    duration: float | None = _setting(
        None, "ROCKET_DURATION", parse_duration, "S", "stop by itself after so long", also_cluster=True
    )
    host: str = _setting("127.0.0.1", "ROCKET_HOST", parse_text, "HOST", "the address that the API listens on")
    api_port: int = _setting(5005, "API_PORT", parse_port, "P", "the API's port; 0: any free one")
    api_workers: int = _setting(
        1, "ROCKET_API_WORKERS", parse_worker_count, "N",
        "processes of the API that share its port; 1: it runs inside the program itself",
    )  # fmt: skip
    observer_interval: float = _setting(
        0.5, "ROCKET_OBSERVER_INTERVAL", parse_duration, "S", "the time between two looks at each node"
    )
    lease: float = _setting(
        5.0, "ROCKET_LEASE", parse_duration, "S", "a replica that was not heard of for so long serves nobody"
    )
    primary_lease: float = _setting(
        5.0, "ROCKET_PRIMARY_LEASE", parse_duration, "S",
        "a primary that was not seen to be in office for so long takes nothing: another may have been promoted",
    )  # fmt: skip
    max_wait: float = _setting(
        0.02, "ROCKET_MAX_WAIT", parse_wait, "S",
        "how long a read waits for a replica to catch up before it goes to the primary; 0: not at all",
    )  # fmt: skip
    max_lag: MaxLag = _setting(
        MaxLag(16 * 2**20, None), "ROCKET_MAX_LAG", parse_max_lag, "LAG",
        "a replica further behind serves nobody: 16MiB, or 5s",
    )  # fmt: skip
    routing: str = _setting(
        "never-stale", "ROCKET_ROUTING", parse_one_of(*ROUTINGS), "HOW",
        "never-stale; or, for comparison only: article, random, primary",
    )  # fmt: skip
    simulator_rate: float | None = _setting(
        None, "ROCKET_SIMULATOR_RATE", parse_rate, "R",
        "the simulator's rides a second, in all; without it, one leisurely client",
    )  # fmt: skip
    server_logs: bool = _setting(
        False, "ROCKET_SERVER_LOGS", parse_yes_or_no, "", "show the servers' own logs too", also_cluster=True
    )
    allowed_hosts: str = _setting(
        "", "ROCKET_ALLOWED_HOSTS", str, "NAMES",
        "host names, separated by commas, that the API answers to beside localhost and addresses",
    )  # fmt: skip
    no_inspector: bool = _setting(
        False, "ROCKET_NO_INSPECTOR", parse_yes_or_no, "", "do without the live page at /inspector"
    )
    inspector_token: str = _setting(
        "", "INSPECTOR_TOKEN", parse_token, "TOKEN",
        "who brings it may use the inspector from anywhere; without one, clients on this machine may",
    )  # fmt: skip
    primary: str | None = _setting(
        None, "ROCKET_PRIMARY", parse_dsn, "DSN",
        "with --no-cluster: the primary of a cluster that is there", secret=True,
    )  # fmt: skip
    replica: tuple[tuple[str, str], ...] = _setting(
        (), "ROCKET_REPLICAS", parse_replicas, "NAME=DSN",
        "with --primary: a replica; may be given again and again, in the environment with spaces between",
        secret=True, repeated=True,
    )  # fmt: skip
    nodes_file: Path | None = _setting(
        None, "ROCKET_NODES_FILE", parse_path, "FILE",
        "with --no-cluster: the nodes of a cluster that is there, NAME DSN a line; read again when it changes",
    )  # fmt: skip
    patroni: tuple[str, ...] = _setting(
        (), "ROCKET_PATRONI", parse_urls, "URL[,URL...]",
        "with --no-cluster: REST APIs of Patroni's that tell the nodes; one that answers is enough", secret=True,
    )  # fmt: skip
    patroni_dsn: str = _setting(
        "postgresql://postgres@{host}:{port}/rocket-rides-scalable", "ROCKET_PATRONI_DSN", parse_template, "DSN",
        "with --patroni: how a member's database is reached, with {host} and {port} for where it is", secret=True,
    )  # fmt: skip
    patroni_ca: Path | None = _setting(
        None, "ROCKET_PATRONI_CA", parse_path, "FILE",
        "with --patroni by https: the certificates that its own has to be signed by (default: the machine's)",
    )  # fmt: skip
    patroni_cert: Path | None = _setting(
        None, "ROCKET_PATRONI_CERT", parse_path, "FILE",
        "with --patroni by https: the certificate to show, with its key, both PEM",
    )  # fmt: skip
    given: frozenset[str] = frozenset()
    """The names of those that somebody gave."""

    @property
    def port_asked_for(self) -> int | None:
        """The port by which a running cluster is to be found, if one was named."""
        return self.postgres_port or None if "postgres_port" in self.given else None

    def url(self, api_port: int) -> str:
        """Return the URL of an API that listens on the host of these settings."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)  # noqa: S104 - no bind
        return f"http://[{host}]:{api_port}" if ":" in host and "[" not in host else f"http://{host}:{api_port}"

    @property
    def nodes(self) -> dict[str, str] | None:
        """The DSNs of the nodes that were given one by one; None if there is none. Raise `InvalidSetting`."""
        if self.primary is None:
            if self.replica:
                raise InvalidSetting("--replica goes with --primary, also in the environment")
            return None
        if self.nodes_file is not None:
            raise InvalidSetting("the nodes are given twice: by --primary and by --nodes-file")
        return {PRIMARY: self.primary, **dict(self.replica)}


GROUPS = {
    "run": ("duration", "simulator_rate"),
    "cluster": ("replicas", "postgres_port", "data_dir", "postgres_bin"),
    "API": ("host", "api_port", "api_workers", "allowed_hosts", "no_inspector", "inspector_token"),
    "routing": ("routing", "max_wait", "max_lag", "lease", "primary_lease", "observer_interval"),
    "a cluster that is there": (
        "primary",
        "replica",
        "nodes_file",
        "patroni",
        "patroni_dsn",
        "patroni_ca",
        "patroni_cert",
    ),
    "logs": ("log_format", "server_logs"),
}
"""What the settings are about, as the help shows them."""


def add_arguments(parser: argparse.ArgumentParser, *, cluster_only: bool = False) -> None:
    """Give a parser a flag for each setting, or for each that concerns the cluster alone."""
    settings = {each.name: each for each in _settings()}
    for title, names in GROUPS.items():
        members = [settings[name] for name in names if settings[name].metadata["cluster"] or not cluster_only]
        if members:
            group = parser.add_argument_group(title)
            for member in members:
                _add_flag(group, member)


def _add_flag(group: argparse._ArgumentGroup, setting: Field[Any]) -> None:
    of_it = setting.metadata
    if setting.default is False:
        group.add_argument(
            flag(setting.name), action="store_const", const="yes", help=f"{of_it['help']} [{of_it['env']}=yes]"
        )
        return
    default = "" if setting.default in {None, "", ()} else f" (default: {_shown(setting.default)})"
    group.add_argument(
        flag(setting.name),
        action="append" if of_it["repeated"] else "store",
        metavar=of_it["metavar"],
        help=f"{of_it['help']}{default} [{of_it['env']}]",
    )


def flag(name: str) -> str:
    """Return a setting's name as a flag."""
    return "--" + name.replace("_", "-")


def load(
    arguments: argparse.Namespace,
    environment: Mapping[str, str] = os.environ,
    dotenv_file: Path = Path(".env"),
) -> Settings:
    """Read the settings: flag, else environment, else `.env`, else default.

    Raise `InvalidSetting`, which names where the wrong value came from.
    """
    try:
        from_file = dotenv.dotenv_values(dotenv_file)
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"cannot read {dotenv_file}: {error}") from None
    by_flag = [name for name in _NODES if getattr(arguments, name, None) is not None]
    if "nodes_file" in by_flag and len(by_flag) > 1:
        raise InvalidSetting(f"{flag(by_flag[0])} and --nodes-file both name the nodes: give one of them")
    values: dict[str, Any] = {}
    for each in _settings():
        env = each.metadata["env"]
        for origin, given in (
            (flag(each.name), getattr(arguments, each.name, None)),
            (env, environment.get(env) or None),
            (f"{env} in {dotenv_file}", from_file.get(env) or None),
        ):
            if given is not None:
                try:
                    values[each.name] = each.metadata["read"](given)
                except ValueError as error:
                    shown = "" if each.metadata["secret"] else f", not {given!r}"
                    raise InvalidSetting(f"{origin} {error}{shown}") from None
                break
    return Settings(**values, given=frozenset(values))


def colours_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether a terminal may be shown colours (see no-color.org)."""
    return not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def _settings() -> list[Field[Any]]:
    return [each for each in fields(Settings) if each.metadata]


def _shown(default: object) -> str:
    if isinstance(default, MaxLag):
        return "16MiB"
    if isinstance(default, float):  # each is a time
        return f"{default * 1000:g}ms" if default < 0.1 else f"{default:g}s"  # noqa: PLR2004 - as people say it
    return str(default)
