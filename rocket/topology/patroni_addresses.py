"""Where Patroni's REST API and its members' databases are, as people write it."""

from __future__ import annotations

from urllib.parse import urlsplit

from rocket.dsn import parse_dsn

HOST, PORT = "{host}", "{port}"
"""What stands in a template for where a member's Postgres is."""


def parse_urls(text: str) -> tuple[str, ...]:
    """Read addresses of REST APIs, separated by commas; raise `ValueError`."""
    urls = tuple(base_url(one.strip()) for one in text.split(","))
    if not all(urls):
        raise ValueError("must be the address of a member's REST API, like http://10.0.0.1:8008, or several")
    return urls


def parse_template(text: str) -> str:
    """Read a DSN in which `{host}` and `{port}` stand for a member's; raise `ValueError`."""
    if text.count(HOST) != 1 or text.count(PORT) != 1:
        raise ValueError("must be a DSN with {host} and {port} in it, like postgresql://rocket@{host}:{port}/app")
    parse_dsn(filled_in(text, "localhost", 5432))
    return text


def filled_in(template: str, host: str, port: int) -> str:
    """Return the DSN of a member."""
    return template.replace(HOST, f"[{host}]" if ":" in host else host).replace(PORT, str(port))


def base_url(text: str) -> str:
    """Return where a REST API is, of the address of something there; "" for what is no such address."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        return ""
    return f"{parts.scheme}://{parts.netloc}" if usable else ""


def without_secrets(url: str) -> str:
    """Return an address without the name and the password in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
