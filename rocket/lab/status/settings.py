"""What the command `status` is told on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from rocket.errors import InvalidSetting
from rocket.lab import settings as run_settings
from rocket.lab.settings import parse_duration

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

_EVERY = "2s"


@dataclass(frozen=True, slots=True)
class StatusSettings:
    """What to look at, how often, and how to tell it."""

    url: str | None
    """The API that was asked for by its address; None: that of the cluster."""
    usual_url: str
    """Where the API is looked for if nobody knows better."""
    data_dir: Path | None
    port: int | None
    """By which the cluster is found, if one was named."""
    watch_s: float | None
    """Seconds between two looks; None: there is but one."""
    json: bool
    colours: bool
    """Whether a terminal may be shown any."""

    @classmethod
    def read(cls, given: argparse.Namespace) -> Self:
        """Read what was given, and what the environment says of cluster and API; raise `InvalidSetting`."""
        settings = run_settings.load(given)
        try:
            watch_s = None if given.watch is None else parse_duration(given.watch)
        except ValueError as error:
            raise InvalidSetting(f"--watch {error}, not {given.watch!r}") from None
        return cls(
            url=None if given.url is None else _url(given.url),
            usual_url=settings.url(settings.api_port),
            data_dir=settings.data_dir,
            port=settings.port_asked_for,
            watch_s=watch_s,
            json=given.json,
            colours=run_settings.colours_wanted(),
        )

    @property
    def names_cluster(self) -> bool:
        """Whether one was asked for by its directory or port."""
        return self.data_dir is not None or self.port is not None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the flags of `status`."""
    parser.add_argument(
        "--watch",
        nargs="?",
        const=_EVERY,
        metavar="S",
        help=f"again every so many seconds ({_EVERY}), until Ctrl-C",
    )
    parser.add_argument("--json", action="store_true", help="as JSON; with --watch an object a line")
    parser.add_argument("--url", metavar="URL", help="the API's address (default: as the cluster tells it)")
    parser.add_argument("--data-dir", metavar="DIR", help="the running cluster's data directory")
    parser.add_argument("--postgres-port", metavar="P", help="a port of the running cluster")


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise InvalidSetting(f"--url must be an address like http://127.0.0.1:5005, not {text!r}")
    return text.rstrip("/")
