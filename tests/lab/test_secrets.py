"""Passwords stay where they were given, and TLS is as the address says."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import aiohttp
import psutil
import pytest
import pytest_asyncio

from rocket import Router, nodes_from_environment
from rocket.consistency import Board
from rocket.dsn import parse_dsn
from rocket.errors import InvalidSetting
from rocket.lab.app import DATABASE
from rocket.lab.serving import check_usable
from rocket.lab.settings import Settings
from rocket.lab.workers import Job
from rocket.routing.observer import Observer
from tests.support.between import pgbouncer
from tests.support.program import running
from tests.support.races import lose_a_backend
from tests.support.servers import ROLES, dsns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable
    from pathlib import Path

    from rocket.cluster.cluster import LocalCluster

MARK = "mark-7f3a9"
"""Stands in every password here."""
RIGHT, WRONG = f"{MARK}-right", f"{MARK}-wrong"
RUN = ("-m", "rocket", "run-all", "--no-cluster", "--api-port", "0")


@pytest_asyncio.fixture
async def by_password(cluster: LocalCluster) -> AsyncIterator[dict[str, str]]:
    """The nodes' addresses by TCP, for a role that has to show its password."""
    await set_password(cluster, RIGHT)
    await cluster.wait_for_catchup()
    yield {
        name: node.tcp_dsn(DATABASE, RIGHT).replace("//postgres:", f"//{ROLES['monitor']}:")
        for name, node in cluster.nodes.items()
    }
    await set_password(cluster, None)


async def set_password(cluster: LocalCluster, password: str | None) -> None:
    """Give the role another password."""
    primary = await cluster.primary.connect()
    text = "NULL" if password is None else f"'{password}'"
    await primary.execute(f"ALTER ROLE {ROLES['monitor']} PASSWORD {text}")
    await primary.close()


async def test_no_password_in_anything_that_a_run_says(
    cluster: LocalCluster, by_password: dict[str, str], kept_dir: Path
) -> None:
    """Neither in its log, through failures, nor in what it answers, nor in its children's command lines."""
    file = kept_dir / "nodes"
    lines = [f"{name} {dsn}" for name, dsn in by_password.items()]
    file.write_text("\n".join(lines))
    said: list[str] = []
    async with running(kept_dir, *RUN, "--nodes-file", str(file), "--api-workers", "2", "--duration", "60") as run:
        url = (await run.prints(r"ready after .*: (http://\S+)"))[1]
        async with aiohttp.ClientSession() as http:
            for path in ("/replicas", "/metrics", "/readyz", "/nowhere"):
                async with http.get(url + path) as response:
                    said.append(await response.text())
        said += [" ".join(child.cmdline()) for child in psutil.Process(run.process.pid).children(recursive=True)]
        assert len(said) > 5
        file.write_text("\n".join([*lines, f"replica7 postgresql://a:{WRONG}/@h/d"]))
        await run.prints("nodes stay as they are: .*replica7: its address must be")
        file.write_text("\n".join([*lines, "replica7 " + by_password["replica0"].replace(RIGHT, WRONG)]))
        await run.prints("nodes stay as they are: replica7: password authentication failed")
        await set_password(cluster, WRONG)
        await cluster.wait_for_catchup()
        await lose_a_backend(cluster.node("replica0"))
        await run.prints("replica0 is out of reach: password authentication failed")
        run.process.terminate()
        assert 0 == await run.ends()
        said.append(run.output)
    assert not [text for text in said if MARK in text]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("postgresql://app:{0}@127.0.0.1:1/d", "no node can be reached: primary: .*refused"),
        ("postgresql://app:{0}/@127.0.0.1:1/d", "--primary must be a DSN like"),
        ("postgresql://app:{0}@127.0.0.1:port/d", "--primary must be a DSN like"),
        ("mysql://app:{0}@127.0.0.1:1/d", "--primary must be a DSN like"),
        ("postgresql://app:1#{0}@127.0.0.1:1/d", "--primary must be a DSN like"),
        ("postgresql://app:{0}@127.0.0.1:1/d?sslmode=odd", "primary: `sslmode` parameter must be one of"),
        ("postgresql://app:{0}@nowhere.invalid/d", "no node can be reached: primary: "),
    ],
)
async def test_wrong_addresses_are_one_line_without_the_password(kept_dir: Path, address: str, words: str) -> None:
    """Exit code 2, and nothing was started."""
    async with running(kept_dir, *RUN, "--primary", address.format(WRONG)) as run:
        assert 2 == await run.ends()
    assert [True] == [line.startswith("rocket: ") for line in run.errors.splitlines()]
    assert MARK not in run.output
    assert re.search(words, run.errors)


@pytest.mark.parametrize(
    "password",
    [
        f"{MARK}#x",
        f"1#{MARK}",
        f"{MARK}/x",
        f"1/{MARK}",
        f"{MARK}?x",
        f"1?{MARK}",
        f"{MARK}@x",
        f"1@{MARK}:7",
        f"{MARK} ",
    ],
)
async def test_the_library_refuses_what_a_password_tears_apart(
    cluster: LocalCluster, password: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At the door, and without a word of it: to open a router, to add a node, and in the environment."""
    dsn = f"postgresql://app:{password}@127.0.0.1:5432/app"
    said = [str(await raises(ValueError, Router.open({"primary": dsn})))]
    async with await Router.open(dsns(cluster)) as router:
        said.append(str(await raises(ValueError, router.add("replica7", dsn))))
        said.append(str(await raises(ValueError, router.add("replica0", dsn))))
        assert len(cluster.nodes) == len(router.pools)
    for environment in (
        {"ROCKET_PRIMARY": dsn},
        {"ROCKET_PRIMARY": "postgresql://p", "ROCKET_REPLICAS": f"r={dsn}"},
    ):
        with pytest.raises(InvalidSetting) as caught:
            nodes_from_environment(environment)
        said.append(str(caught.value))
    assert ["must be"] * 5 == re.findall("must be", " ".join(said))
    assert MARK not in caplog.text + "".join(said)


async def raises(kind: type[Exception], act: Awaitable[object]) -> Exception:
    """Return the error that something comes to."""
    with pytest.raises(kind) as caught:
        await act
    return caught.value


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://app:a%23b%40@h:1/d?sslmode=require",
        "postgresql:///d?host=/tmp&port=1",
        "postgres://u@[::1]:5432/d",
        "postgresql://u:p@h1:1,h2:2/d?sslrootcert=/a@b",
    ],
)
def test_whole_addresses_are_let_through(dsn: str) -> None:
    """With what is special in them escaped; several hosts are one node."""
    assert dsn == parse_dsn(dsn)


async def test_what_only_asyncpg_can_tell_of_an_address_is_not_repeated(caplog: pytest.LogCaptureFixture) -> None:
    """Its words about a number that is none are a piece of what was given."""
    observer = Observer({"primary": f"postgresql://app@/app?host=/nowhere&port={MARK}"}, Board(), interval_s=1)
    await observer.run_once()
    observer.close()
    assert "primary is out of reach: its address cannot be used" in caplog.text
    assert MARK not in caplog.text


async def test_a_wrong_password_is_one_line(by_password: dict[str, str]) -> None:
    """It will not get better by itself, though another node may let us in."""
    with pytest.raises(InvalidSetting, match=r"^replica0: password authentication failed") as caught:
        await check_usable(by_password | {"replica0": by_password["replica0"].replace(RIGHT, WRONG)})
    assert MARK not in str(caught.value)


async def test_missing_tables_and_rights_are_named(cluster: LocalCluster) -> None:
    """At the start, and what would make them."""
    elsewhere = cluster.primary.dsn("postgres")
    with pytest.raises(InvalidSetting, match=r"primary has no table covers, epochs, .*rocket schema"):
        await check_usable({"primary": elsewhere})
    primary = await cluster.primary.connect()
    await primary.execute("CREATE ROLE rocket_nobody LOGIN")
    nobody = cluster.primary.dsn(DATABASE).replace("//postgres@", "//rocket_nobody@")
    try:
        with pytest.raises(
            InvalidSetting,
            match=r"primary: the role lacks INSERT on covers, .*INSERT on epochs, .*UPDATE on users",
        ):
            await check_usable({"primary": nobody})
    finally:
        await primary.execute("DROP ROLE rocket_nobody")
        await primary.close()


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A key, and a certificate for 127.0.0.1 that it has signed itself."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("there is no openssl to make a certificate with")
    home = tmp_path_factory.mktemp("tls")
    key, crt = home / "key.pem", home / "crt.pem"
    subprocess.run(  # noqa: S603 - found above
        [
            program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", "1", "-subj", "/CN=rocket", "-addext", "subjectAltName=IP:127.0.0.1",
            "-keyout", key, "-out", crt,
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, crt


async def test_tls_that_the_server_does_not_speak_is_refused(by_password: dict[str, str]) -> None:
    """Rather than done without."""
    with pytest.raises(InvalidSetting, match=r"primary: .*rejected SSL upgrade"):
        await check_usable({"primary": by_password["primary"] + "?sslmode=require"})


async def test_the_certificate_is_verified(
    cluster: LocalCluster, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    """The right one lets us in, another one, or another name, does not: here with a PgBouncer that speaks TLS."""
    key, crt = certificate
    readable = [
        "client_tls_sslmode = require",
        "client_tls_key_file = {home}/key",
        "client_tls_cert_file = {home}/crt",
    ]
    with pgbouncer(cluster, ROLES["monitor"], *readable, files={"key": key, "crt": crt}) as nodes:
        full = f"?sslmode=verify-full&sslrootcert={crt}"
        await check_usable({"primary": nodes["primary"] + full})
        with pytest.raises(InvalidSetting, match=r"certificate verify failed.*Hostname mismatch|doesn't match"):
            await check_usable({"primary": nodes["primary"].replace("127.0.0.1", "localhost") + full})
        with pytest.raises(InvalidSetting, match=r"primary: .*sslrootcert|No such file"):
            await check_usable({"primary": nodes["primary"] + f"?sslmode=verify-full&sslrootcert={tmp_path}/none"})


def test_a_workers_job_does_not_show_its_passwords() -> None:
    """In a traceback, say."""
    dsn = f"postgresql://rocket:{RIGHT}@db0/rides"
    settings = Settings(primary=dsn, replica=(("replica0", dsn),), patroni=(dsn,), patroni_dsn=dsn)
    assert MARK not in repr(Job(1, {"primary": dsn}, settings))
