"""Sessions for web services: `rocket.web.asgi` and `rocket.web.aiohttp` put one at hand for each request."""

from rocket.web.carriers import Carrier, Cookie, Header

__all__ = ["Carrier", "Cookie", "Header"]
