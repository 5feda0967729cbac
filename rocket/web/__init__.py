"""Sessions for web services: `rocket.web.asgi` and `rocket.web.aiohttp` give each request one."""

from rocket.web.carriers import Carrier, Cookie, Header

__all__ = ["Carrier", "Cookie", "Header"]
