"""The request that is being answered, for whoever writes lines about it."""

from __future__ import annotations

from contextvars import ContextVar

REQUEST_ID: ContextVar[str | None] = ContextVar("REQUEST_ID", default=None)
"""None outside of requests, and where requests have no ids."""
