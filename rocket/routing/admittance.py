"""Why a node does not let us in, said without a password."""

from __future__ import annotations

import asyncpg

from rocket.errors import in_words


def is_about_the_address(error: BaseException) -> bool:
    """Tell whether asyncpg could make nothing of the DSN, or of what goes with it."""
    return isinstance(error, ValueError) and not isinstance(error, OSError)  # a certificate's error is both


def told(error: BaseException) -> str:
    """Return what an error says; of one about the address, only where its words are asyncpg's own.

    Those of any other `ValueError` may be a piece of the DSN, and so of the password.
    """
    if is_about_the_address(error) and not isinstance(error, asyncpg.ClientConfigurationError):
        return "its address cannot be used"
    return in_words(error)
