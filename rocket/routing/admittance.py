"""Why a node does not let us in: whether that will last, and how to say it without a password."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg

from rocket.errors import NodesUnusable, in_words

if TYPE_CHECKING:
    from collections.abc import Mapping

_CLOSED = (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError)
"""A role or password that is refused, a database that is not there."""


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


def all_told(failures: Mapping[str, Exception]) -> str:
    """Return what keeps nodes from being reached, each by its name."""
    return "; ".join(f"{name}: {told(error)}" for name, error in failures.items())


def must_be_worth_waiting_for(failures: Mapping[str, Exception]) -> None:
    """Raise `NodesUnusable` if what nodes failed of lasts until somebody changes something, for each of them."""
    if failures and all(is_about_the_address(error) or isinstance(error, _CLOSED) for error in failures.values()):
        raise NodesUnusable(f"no primary is found, nor will be until something is changed: {all_told(failures)}")
