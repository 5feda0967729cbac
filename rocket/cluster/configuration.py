"""What each server of a local cluster is told, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "rocket.conf"
"""Lies in the data directory, is included by postgresql.conf, and is written anew before each start."""


class Setting(NamedTuple):
    """One line of a configuration file."""

    name: str
    value: str | int
    why: str
    since: int = 0
    """The first major version that knows it."""


SHARED_MEMORY_IN_FILES = Setting(
    "dynamic_shared_memory_type", "mmap", "what a killed server leaves goes with its directory"
)

_SHARED = (
    Setting("listen_addresses", "127.0.0.1", "nothing listens beyond this machine"),
    Setting("unix_socket_permissions", "0700", "only the account that made the cluster gets in by socket"),
    Setting("wal_log_hints", "on", "lets pg_rewind turn an old primary into a replica"),
    Setting("wal_keep_size", "256MB", "a replica that was away for a while can follow again; bounded"),
    Setting("max_wal_size", "256MB", "a bounded directory"),
    Setting("max_wal_senders", 32, "replicas, and their replacements while they are cloned"),
    Setting("max_connections", 200, "the same on every node, as hot standby demands"),
    Setting("shared_buffers", "32MB", "six servers on one small machine"),
    SHARED_MEMORY_IN_FILES,
    Setting("wal_retrieve_retry_interval", "100ms", "a replica finds a restarted primary at once"),
    Setting("wal_receiver_status_interval", "1s", "the primary knows where its replicas are"),
    Setting("wal_receiver_timeout", "5s", "a silent primary is noticed"),
    Setting("wal_sender_timeout", "5s", "a silent replica is noticed"),
    Setting("io_method", "sync", "no I/O worker processes beside each of six small servers", since=18),
    Setting("log_checkpoints", "off", "server.log is for what needs a reader"),
    Setting("log_line_prefix", "%m [%p] ", "time and process"),
    Setting("timezone", "UTC", "one clock for all logs"),
    Setting("log_timezone", "UTC", "one clock for all logs"),
)


def server_configuration(
    *,
    name: str,
    major: int,
    port: int,
    socket_dir: Path,
    primary_port: int | None,
    apply_delay_ms: int,
) -> str:
    """Return the text of one server's configuration file; without a `primary_port`, it follows nobody."""
    way = {
        "host": str(socket_dir),
        "port": str(primary_port),
        "user": "postgres",
        "application_name": name,
    }
    upstream = " ".join(f"{key}={_quoted_for_libpq(value)}" for key, value in way.items() if primary_port)
    own = (
        Setting("cluster_name", name, "shown by ps"),
        Setting("port", port, "also the name of the socket"),
        Setting("unix_socket_directories", str(socket_dir), "a 0700 directory of this run's own"),
        Setting("primary_conninfo", upstream, "whom to follow; without effect on a primary"),
        Setting("recovery_min_apply_delay", f"{apply_delay_ms}ms", "lag on demand; without effect on a primary"),
    )
    lines = ["# Written by rocket at every start: changes made here are lost."]
    for setting in (*_SHARED, *own):
        if major >= setting.since:
            lines += [f"# {setting.why}", f"{setting.name} = {_quoted(str(setting.value))}"]
    return "\n".join([*lines, ""])


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _quoted_for_libpq(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
