"""Where Patroni and etcd are, and how an unprivileged account is made to run Patroni."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rocket.errors import SetupError

if TYPE_CHECKING:
    from rocket.cluster.process import Account

_DRIVERS = ("psycopg", "psycopg2")
_HOW_PATRONI = "`uv sync --group patroni`, or `pip install 'patroni[etcd3]' 'psycopg[binary]'`"
_HOW_ETCD = "`apt-get install etcd-server`, or from etcd.io"


class ProgramsNotFound(SetupError):
    """Patroni, or what it needs beside Postgres, is not installed."""


@dataclass(frozen=True, slots=True)
class Programs:
    """What a cluster of Patroni's is made with, beside Postgres itself."""

    etcd: str
    patroni: tuple[str, ...]
    """The beginning of Patroni's command line; it runs as the account that it was found for."""


def find(account: Account | None) -> Programs:
    """Find them, for `account` to run Patroni; raise `ProgramsNotFound`, which says how to get what is missing."""
    if importlib.util.find_spec("patroni") is None or importlib.util.find_spec("etcd") is None:
        raise ProgramsNotFound(f"Patroni is not installed: {_HOW_PATRONI}")
    if not any(importlib.util.find_spec(driver) for driver in _DRIVERS):
        raise ProgramsNotFound(f"Patroni has no driver for Postgres: {_HOW_PATRONI}")
    etcd = shutil.which("etcd")
    if etcd is None:
        raise ProgramsNotFound(f"there is no etcd: {_HOW_ETCD}")
    return Programs(etcd, (*_as(account), sys.executable, "-m", "patroni"))


def patronictl(configuration: Path) -> str:
    """Return the beginning of a command line by which people talk to the cluster."""
    return f"{Path(sys.executable).with_name('patronictl')} -c {configuration}"


def _as(account: Account | None) -> tuple[str, ...]:
    """Return what is put before a command line to run it as an account that may not see our interpreter.

    Patroni executes its interpreter anew, so a copy of the descriptors would not do: the account gets the right to
    pass through directories that are closed to it, for Patroni's processes alone.
    """
    if account is None:
        return ()
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise ProgramsNotFound("root needs setpriv (util-linux) to have Patroni run as another user")
    return (
        setpriv,
        f"--reuid={account.uid}",
        f"--regid={account.gid}",
        "--clear-groups",
        "--inh-caps=+dac_override",
        "--ambient-caps=+dac_override",
        "--pdeathsig=TERM",  # which a change of account clears
        "--",
    )
