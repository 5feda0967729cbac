"""Patroni's REST API by https, with certificates that nobody else trusts, and clients that have to show theirs."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from rocket.errors import InvalidSetting
from rocket.topology.patroni_rest import PatroniSilent, RestClient
from rocket.topology.patroni_tls import Tls

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def pem(tmp_path: Path) -> str:
    """A certificate of this machine's, signed by itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    key, certificate, both = (tmp_path / name for name in ("key.pem", "cert.pem", "both.pem"))
    made = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    named = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
    command = [openssl, *made, *named, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - a program that was looked for
    both.write_text(certificate.read_text() + key.read_text())
    return str(both)


async def cluster(_request: web.Request) -> web.Response:
    """Answer `GET /cluster`."""
    return web.json_response({"members": [{"name": "node1", "host": "h", "role": "leader"}]})


async def test_a_private_ca_and_a_certificate_of_ones_own(pem: str) -> None:
    """Each where it is asked for."""
    app = web.Application()
    app.router.add_get("/cluster", cluster)
    demanding = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=pem)
    demanding.load_cert_chain(pem)
    demanding.verify_mode = ssl.CERT_REQUIRED
    server = TestServer(app, scheme="https")
    await server.start_server(ssl=demanding)
    try:
        url = f"https://127.0.0.1:{server.port}"
        for tls in (None, Tls(ca=pem)):
            async with RestClient([url], tls) as client:
                with pytest.raises(PatroniSilent):
                    await client.listing()
        async with RestClient([url], Tls(pem, pem)) as client:
            assert "node1" == (await client.listing()).leader
    finally:
        await server.close()


async def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """At the start."""
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-")
    for tls, words in (
        (Tls(ca="/nowhere"), "--patroni-ca: cannot use /nowhere: No such file"),
        (Tls(ca=str(garbage)), "--patroni-ca: cannot use .*: it has to be PEM"),
        (Tls(certificate=str(garbage)), "--patroni-cert: cannot use .*: it has to be PEM"),
    ):
        with pytest.raises(InvalidSetting, match=words):
            RestClient([], tls)
