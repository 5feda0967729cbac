"""Where Patroni and etcd are installed, and the command line that runs Patroni as an unprivileged account."""

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
    """The programs of a Patroni cluster, beside Postgres itself."""

    etcd: str
    patroni: tuple[str, ...]
    """The beginning of Patroni's command line, which runs it as the account given to `find`."""


def find(account: Account | None) -> Programs:
    """Return the programs, for `account` to run; raise `ProgramsNotFound`, which says how to install them."""
    if importlib.util.find_spec("patroni") is None or importlib.util.find_spec("etcd") is None:
        raise ProgramsNotFound(f"Patroni is not installed: {_HOW_PATRONI}")
    if not any(importlib.util.find_spec(driver) for driver in _DRIVERS):
        raise ProgramsNotFound(f"Patroni has no driver for Postgres: {_HOW_PATRONI}")
    etcd = shutil.which("etcd")
    if etcd is None:
        raise ProgramsNotFound(f"there is no etcd: {_HOW_ETCD}")
    return Programs(etcd, (*_as(account), sys.executable, "-m", "patroni"))


def patronictl(configuration: Path) -> str:
    """Return the beginning of a `patronictl` command line."""
    return f"{Path(sys.executable).with_name('patronictl')} -c {configuration}"


def _as(account: Account | None) -> tuple[str, ...]:
    """Return what precedes a command line to run it as an account that may not enter our interpreter's directory.

    Patroni executes its interpreter again, so an open file descriptor is not enough: Patroni's processes, and no
    others, get the capability to pass through directories that are closed to the account.
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
