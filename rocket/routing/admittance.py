"""Why a node does not let us in: whether that will last, and how to say it without a password."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import asyncpg

from rocket.errors import NodesUnusable, describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class AddressUnusable(Exception):
    """Nothing can be made of a node's DSN."""


_LASTING = (
    AddressUnusable,
    asyncpg.ClientConfigurationError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)
"""A wrong address, a role or password that is refused, a database that is not there."""


@contextlib.contextmanager
def connecting() -> Iterator[None]:
    """Raise `AddressUnusable` in place of a `ValueError`, whose words may be a piece of the password.

    Those of a `ClientConfigurationError` are asyncpg's own, and a certificate's error, too, is a `ValueError`.
    """
    try:
        yield
    except (asyncpg.ClientConfigurationError, OSError):
        raise
    except ValueError:
        raise AddressUnusable("its address cannot be used") from None


def all_told(failures: Mapping[str, Exception]) -> str:
    """Return what keeps nodes from being reached, each by its name."""
    return "; ".join(f"{name}: {describe(error)}" for name, error in failures.items())


def check_reachable(failures: Mapping[str, Exception]) -> None:
    """Raise `NodesUnusable` if what nodes failed of lasts until somebody changes something, for each of them."""
    if failures and all(isinstance(error, _LASTING) for error in failures.values()):
        raise NodesUnusable(f"no primary is found, nor will be until something is changed: {all_told(failures)}")
