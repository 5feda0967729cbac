"""What each member of a local Patroni cluster is told, and why."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCOPE = "rocket"
SUPERUSER, REPLICATOR, REST_USER = "postgres", "replicator", "rocket"
HOST = "127.0.0.1"
"""Where everything listens, and nowhere else."""

TTL_S = 20
"""How long the leader's lock lives without being renewed: Patroni takes no less."""

_DYNAMIC: dict[str, Any] = {
    "ttl": TTL_S,
    "loop_wait": 1,  # Patroni looks every second, so that what is done by hand shows soon
    "retry_timeout": 3,  # loop_wait + 2 * retry_timeout has to fit into the TTL
    "maximum_lag_on_failover": 16 * 2**20,
    "postgresql": {
        "use_pg_rewind": True,  # an old leader comes back as a replica
        "remove_data_directory_on_rewind_failure": True,  # or is made anew
        "parameters": {
            "wal_log_hints": "on",  # what pg_rewind needs
            "wal_level": "replica",
            "wal_keep_size": "256MB",
            "max_connections": 100,
            "max_wal_senders": 10,
        },
    },
}
_PARAMETERS = {
    "shared_buffers": "32MB",  # three servers on one small machine
    "max_wal_size": "256MB",
    "dynamic_shared_memory_type": "mmap",  # what a killed server leaves goes with its directory
    "wal_retrieve_retry_interval": "100ms",  # a replica finds the new leader at once
    "wal_receiver_timeout": "5s",
    "wal_receiver_status_interval": "1s",
    "wal_sender_timeout": "5s",
    "unix_socket_directories": "",  # TCP with a password is the only way in
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] ",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
_NO_WORKERS = {"io_method": "sync"}  # no I/O workers beside each of three small servers
_IO_METHOD_SINCE = 18


@dataclass(frozen=True, slots=True)
class Secrets:
    """Random passwords; who has them may do anything in the cluster."""

    superuser: str
    replicator: str
    rest: str
    """Of the REST API's user `rocket`, for what changes something there."""


def member_configuration(
    *,
    name: str,
    home: Path,
    port: int,
    rest_port: int,
    etcd_port: int,
    bin_dir: Path,
    major: int,
    secrets: Secrets,
    tags: Mapping[str, bool],
    detour: str | None = None,
) -> str:
    """Return the text of one member's configuration file: JSON, which is YAML.

    By its `detour` others reach it, and it reaches etcd.
    """
    door = detour or HOST
    return json.dumps(
        {
            "scope": SCOPE,
            "name": name,
            "log": {"dir": str(home), "file_num": 1, "level": "INFO"},
            "restapi": {
                "listen": f"{HOST}:{rest_port}",
                "connect_address": f"{door}:{rest_port}",
                "authentication": {"username": REST_USER, "password": secrets.rest},
            },
            "ctl": {"authentication": {"username": REST_USER, "password": secrets.rest}},
            # Without looking up where etcd itself says that it is: that is past every detour.
            "etcd3": {"host": f"{door}:{etcd_port}", "use_proxies": detour is not None},
            "bootstrap": {
                "dcs": _DYNAMIC,
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums", "no-sync"],
            },
            "postgresql": {
                "listen": f"{HOST}:{port}",
                "connect_address": f"{door}:{port}",
                "data_dir": str(home / "data"),
                "bin_dir": str(bin_dir),
                "pgpass": str(home / "pgpass"),
                "authentication": {
                    "superuser": {"username": SUPERUSER, "password": secrets.superuser},
                    "replication": {"username": REPLICATOR, "password": secrets.replicator},
                },
                "basebackup": [{"checkpoint": "fast"}, "no-sync"],  # a spread one takes minutes
                "pg_hba": [
                    f"host all all {HOST}/32 scram-sha-256",
                    f"host replication {REPLICATOR} {HOST}/32 scram-sha-256",
                ],
                "parameters": _PARAMETERS | (_NO_WORKERS if major >= _IO_METHOD_SINCE else {}),
            },
            "tags": dict(tags),
        },
        indent=1,
    )
