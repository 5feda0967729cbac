"""Settings: fields of a dataclass, read from flags, the environment, `.env` and defaults, in this order.

`setting` declares one, `add_flags` gives a parser their flags, and `read_settings` reads them; `Settings` are
those of `run-all` and `cluster up`. A `parse_*` function reads one text, or raises a `ValueError` that says what
would be right.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rocket.consistency import Freshness
from rocket.dsn import PRIMARY, parse_dsn, parse_replicas
from rocket.errors import InvalidSetting
from rocket.topology.patroni import parse_template, parse_urls

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping

ROUTINGS = ("never-stale", "article", "random", "primary")
LOG_FORMATS = ("text", "json")
DOTENV = Path(".env")

# --- what a text may be ---

_LARGEST_PORT = 65535
_MOST_REPLICAS = 30
_MOST_WORKERS = 16
"""Each has up to eleven connections to every node, and a node of a local cluster takes 200."""
_SIZES = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) *(ms|s|min|h)?")
_SECONDS = {"ms": 0.001, None: 1.0, "s": 1.0, "min": 60.0, "h": 3600.0}
_SIZE = re.compile(r"([0-9]{1,18}) *([A-Za-z]+)")
_RATE = re.compile(r"[0-9]{1,6}(?:\.[0-9]{0,24})?(?:e-[0-9]{1,2})?|\.[0-9]{1,24}")


class MaxLag(NamedTuple):
    """How far behind a replica may be and still serve: None is no bound."""

    bytes: int | None
    seconds: float | None = 60.0


def parse_port(text: str) -> int:
    """Read a TCP port; 0 stands for any free one."""
    return parse_whole(text, 0, _LARGEST_PORT)


def parse_replica_count(text: str) -> int:
    """Read a number of replicas."""
    return parse_whole(text, 0, _MOST_REPLICAS)


def parse_worker_count(text: str) -> int:
    """Read a number of processes of the API."""
    return parse_whole(text, 1, _MOST_WORKERS)


def parse_whole(text: str, least: int, most: int) -> int:
    """Read a whole number within bounds."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise ValueError(f"must be a whole number from {least} to {most}")
    return int(text)


def parse_duration(text: str) -> float:
    """Read a time like `0.5`, `20ms`, `5s` or `2min` as seconds, more than none."""
    match = _DURATION.fullmatch(text)
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise ValueError("must be a time above zero, like 0.5, 20ms, 5s or 2min")
    return seconds


def parse_wait(text: str) -> float:
    """Read a time that may be zero."""
    try:
        return 0.0 if text == "0" else parse_duration(text)
    except ValueError as error:
        raise ValueError(f"{error}, or 0 for none") from None


def parse_rate(text: str) -> float:
    """Read a rate, per second."""
    value = float(text) if _RATE.fullmatch(text) else 0.0
    if not 0 < value <= 10_000:  # noqa: PLR2004 - more would measure the simulator
        raise ValueError("must be a number above 0, at most 10000")
    return value


def parse_max_lag(text: str) -> MaxLag:
    """Read a bound on lag: bytes like `16MiB`, beside the default one in seconds, or just seconds like `5s`."""
    size = _SIZE.fullmatch(text)
    if size and size[2].upper() in _SIZES:
        return MaxLag(int(size[1]) * _SIZES[size[2].upper()])
    match = _DURATION.fullmatch(text)
    if match and match[2] and (seconds := parse_duration(text)):
        return MaxLag(None, seconds)
    raise ValueError("must be a number of bytes like 16MiB, or a time like 5s")


def parse_one_of(*choices: str) -> Callable[[str], str]:
    """Return a parser that takes one of these words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return read


def parse_freshness(text: str) -> str:
    """Read what a read may ask to be shown."""
    return str(Freshness.parse(text))


def parse_yes_or_no(text: str) -> bool:
    """Read a switch."""
    return parse_one_of("yes", "no")(text) == "yes"


def parse_text(value: str) -> str:
    """Read a text that is not empty."""
    if not value:
        raise ValueError("must not be empty")
    return value


def parse_token(value: str) -> str:
    """Read a secret that goes into a header and a cookie."""
    if not re.fullmatch(r"[A-Za-z0-9_.~-]{8,200}", value):
        raise ValueError("must be 8 to 200 of A-Z a-z 0-9 _ . ~ -")
    return value


def parse_path(value: str) -> Path:
    """Read a path."""
    if "\0" in value:
        raise ValueError("must not hold a NUL byte")
    try:
        return Path(parse_text(value)).expanduser()
    except RuntimeError as error:  # the home of an unknown user
        raise ValueError(f"cannot be used: {error}") from None


# --- declaring and reading settings ---


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandSettings:
    """The settings of a command: each field that `setting` declares is a flag of the same name."""

    given: frozenset[str] = frozenset()
    """The names of the settings that were given, rather than left at their defaults."""


SettingsT = TypeVar("SettingsT", bound=CommandSettings)


def setting(
    default: Any,
    read: Callable[[Any], Any],
    metavar: str,
    what: str,
    *,
    env: str | None = None,
    shown: str | None = None,
    optional_value: str | None = None,
    also_cluster: bool = False,
    secret: bool = False,
    repeated: bool = False,
) -> Any:
    """Declare a setting: its default, what reads its text, and its help; one whose default is False is a switch.

    `env` names its environment variable, `shown` its default for people. With `optional_value` the flag alone
    stands for that text. The value of a `secret` is in no error and no traceback. A `repeated` flag is read as a
    list.
    """
    metadata = {
        "env": env, "read": read, "metavar": metavar, "help": what, "shown": shown, "const": optional_value,
        "cluster": also_cluster, "secret": secret, "repeated": repeated,
    }  # fmt: skip
    return field(default=default, metadata=metadata, repr=not secret)


def declared(kind: type[CommandSettings]) -> list[Field[Any]]:
    """Return the fields that `setting` declared."""
    return [each for each in fields(kind) if each.metadata]


def flag(name: str) -> str:
    """Return a setting's name as a flag."""
    return "--" + name.replace("_", "-")


def add_flags(
    parser: argparse._ActionsContainer, kind: type[CommandSettings], names: Iterable[str] | None = None
) -> None:
    """Give a parser, or a group of its flags, a flag for each of these settings; by default for all."""
    settings = {each.name: each for each in declared(kind)}
    for name in settings if names is None else names:
        of_it = settings[name].metadata
        env = f" [{of_it['env']}]" if of_it["env"] else ""
        if settings[name].default is False:
            env = env and f"{env[:-1]}=yes]"
            parser.add_argument(flag(name), action="store_const", const="yes", help=f"{of_it['help']}{env}")
            continue
        shown = of_it["shown"] or _shown(settings[name].default)
        options = {"nargs": "?", "const": of_it["const"]} if of_it["const"] else {}
        parser.add_argument(
            flag(name),
            action="append" if of_it["repeated"] else "store",
            metavar=of_it["metavar"],
            help=f"{of_it['help']}{shown and f' (default: {shown})'}{env}".replace("%", "%%"),
            **options,
        )


def read_settings(
    kind: type[SettingsT],
    arguments: argparse.Namespace,
    environment: Mapping[str, str] = os.environ,
    dotenv_file: Path = DOTENV,
) -> SettingsT:
    """Read the settings of a command: flag, else environment, else `.env`, else default.

    Raise `InvalidSetting`, which names where the wrong value came from.
    """
    settings = declared(kind)
    from_file = _read_dotenv(dotenv_file) if any(each.metadata["env"] for each in settings) else {}
    values: dict[str, Any] = {}
    for each in settings:
        env = each.metadata["env"]
        for origin, text in (
            (flag(each.name), getattr(arguments, each.name, None)),
            (env, environment.get(env) or None if env else None),
            (f"{env} in {dotenv_file}", from_file.get(env) or None if env else None),
        ):
            if text is not None:
                try:
                    values[each.name] = each.metadata["read"](text)
                except ValueError as error:
                    shown = "" if each.metadata["secret"] else f", not {text!r}"
                    raise InvalidSetting(f"{origin} {error}{shown}") from None
                break
    return kind(**values, given=frozenset(values))


def _read_dotenv(dotenv_file: Path) -> Mapping[str, str | None]:
    if not dotenv_file.exists():
        return {}
    import dotenv  # noqa: PLC0415 - an extra, needed by no `--help`

    try:
        return dotenv.dotenv_values(dotenv_file)
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"cannot read {dotenv_file}: {error}") from None


def _shown(default: object) -> str:
    """Return a default for people: a float is a time, and an empty one is not shown."""
    if isinstance(default, MaxLag):
        return "16MiB"
    if isinstance(default, float):
        return f"{default * 1000:g}ms" if default < 0.1 else f"{default:g}s"  # noqa: PLR2004 - as people write it
    return "" if default in {None, "", ()} else str(default)


def colours_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a terminal may be shown colours (see no-color.org)."""
    return not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


# --- the settings of run-all ---


@dataclass(frozen=True, slots=True)
class Settings(CommandSettings):
    """Everything that `run-all` can be given."""

    replicas: int = setting(
        5, parse_replica_count, "N", "replicas beside the primary", env="NUM_REPLICAS", also_cluster=True
    )
    postgres_port: int = setting(
        5433, parse_port, "P", "port of the primary; replica i has P+1+i; 0: any free ports",
        env="POSTGRES_PORT", also_cluster=True,
    )  # fmt: skip
    data_dir: Path | None = setting(
        None, parse_path, "DIR", "directory of the cluster, kept for the next run; by default it is temporary",
        env="ROCKET_DATA_DIR", also_cluster=True,
    )  # fmt: skip
    postgres_bin: Path | None = setting(
        None, parse_path, "DIR", "Postgres programs (14 or newer) to use instead of the packaged ones",
        env="ROCKET_POSTGRES_BIN", also_cluster=True,
    )  # fmt: skip
    log_format: str = setting(
        "text", parse_one_of(*LOG_FORMATS), "FORMAT", "text or json", env="ROCKET_LOG_FORMAT", also_cluster=True
    )
    duration: float | None = setting(
        None, parse_duration, "S", "end after this time", env="ROCKET_DURATION", also_cluster=True
    )
    host: str = setting("127.0.0.1", parse_text, "HOST", "address that the API listens on", env="ROCKET_HOST")
    api_port: int = setting(5005, parse_port, "P", "port of the API; 0: any free one", env="API_PORT")
    api_workers: int = setting(
        1, parse_worker_count, "N", "processes that share the API's port; 1: the program itself serves it",
        env="ROCKET_API_WORKERS",
    )  # fmt: skip
    observer_interval: float = setting(
        0.5, parse_duration, "S", "time between two status queries to each node", env="ROCKET_OBSERVER_INTERVAL"
    )
    lease: float = setting(
        5.0, parse_duration, "S", "a replica without a status for this long is not read from", env="ROCKET_LEASE"
    )
    primary_lease: float = setting(
        5.0, parse_duration, "S",
        "a primary without a status for this long gets no reads or writes: another may have been promoted",
        env="ROCKET_PRIMARY_LEASE",
    )  # fmt: skip
    max_wait: float = setting(
        0.02, parse_wait, "S",
        "how long a read waits for a replica to catch up before it goes to the primary; 0: not at all",
        env="ROCKET_MAX_WAIT",
    )  # fmt: skip
    max_lag: MaxLag = setting(
        MaxLag(16 * 2**20), parse_max_lag, "LAG",
        "a replica further behind is not read from: 16MiB (then also one 60s behind), or 5s",
        env="ROCKET_MAX_LAG",
    )  # fmt: skip
    routing: str = setting(
        "never-stale", parse_one_of(*ROUTINGS), "HOW",
        "never-stale; for comparison only: article, random, primary", env="ROCKET_ROUTING",
    )  # fmt: skip
    simulator_rate: float | None = setting(
        None, parse_rate, "R", "rides per second that the simulator writes; by default it is one slow client",
        env="ROCKET_SIMULATOR_RATE",
    )  # fmt: skip
    freshness: str = setting(
        str(Freshness.SESSION), parse_freshness, "HOW",
        "what the simulator's reads ask to be shown: session, global, any, or 'within 10s'",
        env="ROCKET_FRESHNESS",
    )  # fmt: skip
    server_logs: bool = setting(
        False, parse_yes_or_no, "", "show the logs of the Postgres servers too",
        env="ROCKET_SERVER_LOGS", also_cluster=True,
    )  # fmt: skip
    allowed_hosts: str = setting(
        "", str, "NAMES",
        "host names, separated by commas, that the API answers to beside localhost and addresses",
        env="ROCKET_ALLOWED_HOSTS",
    )  # fmt: skip
    no_inspector: bool = setting(
        False, parse_yes_or_no, "", "leave out the live page at /inspector", env="ROCKET_NO_INSPECTOR"
    )
    inspector_token: str = setting(
        "", parse_token, "TOKEN",
        "lets any client that sends it use the inspector; without one, only clients on this machine may",
        env="INSPECTOR_TOKEN",
    )  # fmt: skip
    primary: str | None = setting(
        None, parse_dsn, "DSN", "with --no-cluster: the primary of an existing cluster",
        env="ROCKET_PRIMARY", secret=True,
    )  # fmt: skip
    replica: tuple[tuple[str, str], ...] = setting(
        (), parse_replicas, "NAME=DSN",
        "with --primary: a replica; repeat it for each, or separate them by spaces in the environment",
        env="ROCKET_REPLICAS", secret=True, repeated=True,
    )  # fmt: skip
    nodes_file: Path | None = setting(
        None, parse_path, "FILE",
        "with --no-cluster: the nodes of an existing cluster, NAME DSN a line; read again when it changes",
        env="ROCKET_NODES_FILE",
    )  # fmt: skip
    patroni: tuple[str, ...] = setting(
        (), parse_urls, "URL[,URL...]", "with --no-cluster: Patroni's REST APIs, which name the nodes",
        env="ROCKET_PATRONI", secret=True,
    )  # fmt: skip
    patroni_dsn: str = setting(
        "postgresql://postgres@{host}:{port}/rocket-rides-scalable", parse_template, "DSN",
        "with --patroni: the DSN of a member, with {host} and {port} in it",
        env="ROCKET_PATRONI_DSN", secret=True,
    )  # fmt: skip
    patroni_ca: Path | None = setting(
        None, parse_path, "FILE",
        "with --patroni by https: certificates of the authorities to trust (default: the system's)",
        env="ROCKET_PATRONI_CA",
    )  # fmt: skip
    patroni_cert: Path | None = setting(
        None, parse_path, "FILE", "with --patroni by https: a client certificate with its key, both PEM",
        env="ROCKET_PATRONI_CERT",
    )  # fmt: skip

    @property
    def port_asked_for(self) -> int | None:
        """The port of the running cluster to find, if one was named."""
        return self.postgres_port or None if "postgres_port" in self.given else None

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

    def url(self, api_port: int) -> str:
        """Return the URL of an API that listens on the host of these settings."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)  # noqa: S104 - no bind
        return f"http://[{host}]:{api_port}" if ":" in host and "[" not in host else f"http://{host}:{api_port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverSettings(CommandSettings):
    """What `cover` can be given beside the nodes."""

    beat: float = setting(
        1.0, parse_duration, "S", "how long to wait for all observers: two intervals of the slowest one"
    )
    timeout: float = setting(10.0, parse_duration, "S", "how long it may take besides")
    wait_replicas: bool = setting(
        False, parse_yes_or_no, "", "wait as well until all replicas that answer have replayed it"
    )


GROUPS = {
    "run": ("duration", "simulator_rate", "freshness"),
    "cluster": ("replicas", "postgres_port", "data_dir", "postgres_bin"),
    "API": ("host", "api_port", "api_workers", "allowed_hosts", "no_inspector", "inspector_token"),
    "routing": ("routing", "max_wait", "max_lag", "lease", "primary_lease", "observer_interval"),
    "an existing cluster": (
        "primary", "replica", "nodes_file", "patroni", "patroni_dsn", "patroni_ca", "patroni_cert",
    ),
    "logs": ("log_format", "server_logs"),
}  # fmt: skip
"""The settings by subject, as the help shows them."""


def add_arguments(parser: argparse.ArgumentParser, *, cluster_only: bool = False) -> None:
    """Give a parser the flags of `run-all`, or those that concern the cluster alone."""
    of_cluster = {each.name for each in declared(Settings) if each.metadata["cluster"]}
    for title, names in GROUPS.items():
        members = [name for name in names if name in of_cluster or not cluster_only]
        if members:
            add_flags(parser.add_argument_group(title), Settings, members)


def load(
    arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ, dotenv_file: Path = DOTENV
) -> Settings:
    """Read the settings of `run-all`; raise `InvalidSetting`, as `read_settings` does."""
    by_flag = [name for name in ("primary", "replica", "nodes_file") if getattr(arguments, name, None) is not None]
    if "nodes_file" in by_flag and len(by_flag) > 1:
        raise InvalidSetting(f"{flag(by_flag[0])} and --nodes-file both name the nodes: give one of them")
    return read_settings(Settings, arguments, environment, dotenv_file)
