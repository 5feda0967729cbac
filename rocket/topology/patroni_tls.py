"""How Patroni's REST API is asked by TLS."""

from __future__ import annotations

import ssl
from typing import NamedTuple

from rocket.errors import InvalidSetting


class Tls(NamedTuple):
    """Files that people name."""

    ca: str | None = None
    """Certificates of those whom the API's has to be signed by; None: those that the machine trusts."""
    certificate: str | None = None
    """Our own, in one file with its key; None: we have none to show."""

    def context(self) -> ssl.SSLContext | bool:
        """Return what aiohttp takes; raise `InvalidSetting` for files that cannot be used."""
        if self == Tls():
            return True
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except OSError as error:  # of which an SSLError is one
            raise InvalidSetting(f"--patroni-ca: cannot use {self.ca}: {_why(error)}") from None
        if self.certificate is not None:
            try:
                # Nobody is asked for the passphrase of a key: the wrong one makes that an error.
                context.load_cert_chain(self.certificate, password="")
            except OSError as error:
                raise InvalidSetting(f"--patroni-cert: cannot use {self.certificate}: {_why(error)}") from None
        return context


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return "it has to be PEM, with an unencrypted key where one belongs to it"
    return error.strerror or str(error)
