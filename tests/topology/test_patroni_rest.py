"""Patroni's REST API is asked: by TLS too, and whatever some of its members do."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from rocket.errors import InvalidSetting
from rocket.topology.patroni import PatroniUnavailable
from rocket.topology.patroni_rest import RestClient, Tls
from tests.support.patroni import FakePatroni, hanging, listed

if TYPE_CHECKING:
    from pathlib import Path

    from rocket.cluster.cluster import LocalCluster

ANSWER_TIMEOUT_S = 1.0


async def test_one_member_that_answers_is_enough(cluster: LocalCluster) -> None:
    """And the members that it names are asked when it is gone."""
    patroni = FakePatroni()
    nowhere = "http://127.0.0.1:9"
    async with patroni.serving() as url:
        patroni.members = listed(cluster, "replica0")
        patroni.members[0]["api_url"] = f"{url}/patroni"
        async with RestClient([nowhere, url]) as client:
            assert ["replica0"] == [member.name for member in (await client.listing()).members]
    async with RestClient([nowhere]) as client:
        with pytest.raises(PatroniUnavailable, match=nowhere):
            await client.listing()


async def test_members_that_hang_delay_no_answer(cluster: LocalCluster) -> None:
    """However many there are: the answer of another one comes long before they are given up."""
    patroni = FakePatroni()
    patroni.members = listed(cluster, "replica0")
    with hanging(4) as urls:
        async with patroni.serving() as url, RestClient([*urls, url]) as client:
            asked_at = time.monotonic()
            assert ["replica0"] == [member.name for member in (await client.listing()).members]
            assert time.monotonic() - asked_at < ANSWER_TIMEOUT_S

        async with RestClient(urls, answer_timeout_s=ANSWER_TIMEOUT_S) as client:
            asked_at = time.monotonic()
            with pytest.raises(PatroniUnavailable, match="no answer within 1 s"):
                await client.listing()
            assert time.monotonic() - asked_at < ANSWER_TIMEOUT_S + 0.5


async def test_what_is_no_address_is_refused() -> None:
    """Before anything is asked."""
    with pytest.raises(ValueError, match="addresses of REST APIs"):
        RestClient(["10.0.0.1:8008"])


# --- TLS ---


@pytest.fixture
def pem(tmp_path: Path) -> str:
    """A certificate for this machine, signed by itself, and its key."""
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


async def test_a_private_ca_and_a_certificate_of_ones_own(pem: str) -> None:
    """Each where it is asked for."""
    patroni = FakePatroni()
    patroni.members = [{"name": "node1", "host": "h", "role": "leader"}]
    app = web.Application()
    app.router.add_get("/cluster", patroni.cluster)
    demanding = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=pem)
    demanding.load_cert_chain(pem)
    demanding.verify_mode = ssl.CERT_REQUIRED
    server = TestServer(app, scheme="https")
    await server.start_server(ssl=demanding)
    try:
        url = f"https://127.0.0.1:{server.port}"
        for tls in (None, Tls(ca=pem)):
            async with RestClient([url], tls) as client:
                with pytest.raises(PatroniUnavailable):
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
        (Tls(ca="/nowhere"), "cannot use /nowhere as Patroni's CA: No such file"),
        (Tls(ca=str(garbage)), "cannot use .*garbage.pem as Patroni's CA: it has to be PEM"),
        (Tls(certificate=str(garbage)), "garbage.pem as client certificate for Patroni: it has to be PEM"),
    ):
        with pytest.raises(InvalidSetting, match=words):
            RestClient([], tls)
