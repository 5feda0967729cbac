"""Bad input: whatever is sent, the answer is a documented 4xx in JSON, and nothing is logged as an error.

Requests are written byte by byte to a server on a socket of its own: no client library that would refuse to send
them, or mend them, stands in between.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import re
import time
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus, urlencode

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rocket.lab.api.limits import Bounds
from rocket.lab.api.parameters import BIGINT_MAX
from rocket.lab.api.problems import MAX_BODY_BYTES
from tests.support.raw_http import (
    FORM,
    JSON,
    UNKNOWN,
    Address,
    answer_from,
    ask,
    connection,
    new_ride,
    refusal,
    request,
)  # fmt: skip
from tests.support.routers import board_of_primary, opened, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.cluster.cluster import LocalCluster
    from rocket.lab.comparison import ComparisonRouter

pytestmark = pytest.mark.usefixtures("nothing_is_logged_as_an_error")

MULTIPART = b"Content-Type: multipart/form-data; boundary=B"
CHUNKED = b"Transfer-Encoding: chunked"
DISTANCE = b'Content-Disposition: form-data; name="distance"\r\n'
UPLOAD = b'Content-Disposition: form-data; name="distance"; filename="ride.gpx"\r\n'

NO_DISTANCE = (422, "Please specify parameter 'distance'.")
WRONG_DISTANCE = (422, "Parameter 'distance' must be a floating-point number.")
WRONG_EMAIL = (422, "Parameter 'email' must be an e-mail address of at most 255 characters.")
WRONG_KEY = (400, "Idempotency-Key must be 1 to 255 printable characters.")
NO_JSON = (400, "Request body could not be read as JSON.")
NO_FORM = (400, "Request body could not be read as a form.")
TOO_LARGE = (413, f"Request body is larger than {MAX_BODY_BYTES} bytes.")
UNKNOWN_USER = (401, "Credentials in Authorization were invalid.")
NOT_HTTP = (400, "The request is not valid HTTP.")
BAD_BODY = {400, 408, 413, 415, 422}
"""Statuses for bodies that no honest client sends."""


def multipart(*parts: bytes) -> bytes:
    """Put a multipart body together."""
    return b"".join(b"--B\r\n" + part + b"\r\n" for part in parts) + b"--B--\r\n"


def chunked(body: bytes) -> bytes:
    """Send a body in chunks."""
    pieces = [body[start : start + 4096] for start in range(0, len(body), 4096)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def framed(framing: str, content_type: bytes, body: bytes) -> bytes:
    """Put a request for a ride together whose body is announced by its length, or sent in chunks."""
    if framing == "length":
        return new_ride(content_type, body=body)
    return new_ride(content_type, CHUNKED, body=chunked(body))


@pytest_asyncio.fixture(scope="module")
async def shared_address(cluster: LocalCluster) -> AsyncIterator[Address]:
    """Run one server for all tests: it keeps nothing of what it refuses."""
    board = await board_of_primary(cluster)
    async with opened(cluster, board, lease_s=3600) as router, serving(router, Bounds()) as address:
        yield address


@pytest.fixture
def address(shared_address: Address) -> Address:
    """The address of the server for all tests."""
    return shared_address


@pytest_asyncio.fixture
async def own_address(router: ComparisonRouter, bounds: Bounds) -> AsyncIterator[Address]:
    """Run a server for one test: what it logs as it ends belongs to the test, too."""
    async with serving(router, bounds) as address:
        yield address


@pytest_asyncio.fixture
async def user(address: Address, email: str) -> bytes:
    """Return the header with the credentials of a user who exists."""
    await ask(address, request(b"POST /users", JSON, body=json.dumps({"email": email}).encode()))
    return f"Authorization: {email}".encode()


class TestParameters:
    """Well-formed bodies that do not hold what they should."""

    @pytest.mark.parametrize(
        "body",
        [
            b"", b"distance=", b"distance", b"=1", b"Distance=1", b"distance[]=1", b"\0distance=1", b"&&&", b"%",
            b"{}", b'{"distance": 1}',
        ],
    )  # fmt: skip
    async def test_a_form_without_distance_is_refused(self, address: Address, body: bytes) -> None:
        """The parameter has to be there by its very name."""
        assert refusal(await ask(address, new_ride(FORM, body=body))) == NO_DISTANCE

    @pytest.mark.parametrize(
        "body",
        [
            b"{}", b'{"distance": null}', b'{"distance": ""}', b'{"DISTANCE": 1}', b'{"distance\\u0000": 1}',
            b"[]", b'[{"distance": 1}]', b"null", b"1", b'"distance"', b"NaN", b"true",
        ],
    )  # fmt: skip
    async def test_json_without_distance_is_refused(self, address: Address, body: bytes) -> None:
        """JSON that is no object, or an object without the parameter, lacks it."""
        assert refusal(await ask(address, new_ride(JSON, body=body))) == NO_DISTANCE

    @pytest.mark.parametrize(
        "value",
        [
            " ", "1\0", "\0", "1 2", "1_000", "1.2.3", "--1", "+", ".", "e5", "1e", "1e+", "0x1p3", "٣", "½",
            "\N{MATHEMATICAL BOLD DIGIT ONE}", "\ufeff1", "1\u2028\u20292", "1;2", "1'--", "$1", "${1}",
            "true", "null",
            pytest.param("9" * 400, id="400 digits"),
            pytest.param("9" * 60_000, id="60,000 digits"),
            pytest.param("1e" + "9" * 60_000, id="exponent of 60,000 digits"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("encoding", ["form", "JSON"])
    async def test_text_that_is_no_number_is_refused(self, address: Address, encoding: str, value: str) -> None:
        """Numbers are written with the digits 0 to 9, and are finite."""
        if encoding == "form":
            sent = new_ride(FORM, body=f"distance={quote_plus(value)}".encode())
        else:
            sent = new_ride(JSON, body=json.dumps({"distance": value}).encode())
        assert refusal(await ask(address, sent)) == WRONG_DISTANCE

    @pytest.mark.parametrize(
        "value",
        [
            b"true", b"[]", b"[1]", b"{}", b'{"distance": 1}', b"NaN", b"Infinity", b"-Infinity", b"1e999",
            b'"\\u0000"', b'"1\\u0000"', b'"\\ud800"',
            pytest.param(b"9" * 400, id="400 digits"),
            pytest.param(b"1e" + b"9" * 60_000, id="exponent of 60,000 digits"),
        ],
    )  # fmt: skip
    async def test_json_that_is_no_finite_number_is_refused(self, address: Address, value: bytes) -> None:
        """What JSON holds has to be a number too, and not only to look like one."""
        assert refusal(await ask(address, new_ride(JSON, body=b'{"distance": %b}' % value))) == WRONG_DISTANCE

    async def test_a_long_text_that_is_no_number_is_refused_at_once(self, address: Address) -> None:
        """Telling that it is none takes no time that grows faster than the text: it is everybody's time."""
        began = time.monotonic()
        answer = await ask(address, new_ride(FORM, body=b"distance=" + b"1" * 16_000 + b"x"))
        assert refusal(answer) == WRONG_DISTANCE
        assert time.monotonic() - began < 1

    @pytest.mark.parametrize(
        "value",
        [
            b"a@b\0", b"\0@b", b"a@b\x7f", b"a@b\xc2\x85", b"a@b\r\nX: y",
            pytest.param(b"a" * 20_000, id="20,000 letters"),
            pytest.param(b"@" * 20_000, id="20,000 signs"),
        ],
    )  # fmt: skip
    async def test_hostile_addresses_are_refused(self, address: Address, value: bytes) -> None:
        """What Postgres cannot store, or people cannot read, creates no user."""
        sent = request(b"POST /users", FORM, body=b"email=" + quote(value).encode())
        assert refusal(await ask(address, sent)) == WRONG_EMAIL

    @pytest.mark.parametrize("value", ["%FF", "%ED%A0%80", "%C0%80"])
    async def test_an_address_that_is_not_utf_8_is_refused(self, address: Address, email: str, value: str) -> None:
        """Bytes that are no text are not replaced by some: two addresses would become one."""
        sent = request(b"POST /users", FORM, body=f"email={quote(email)}{value}".encode())
        assert refusal(await ask(address, sent))[0] in {400, 422}

    @pytest.mark.parametrize("value", [rb"a@b\u0000", rb"\u0000", rb"a@\ud800", rb"a@b\n", rb"\ud83d@b"])
    async def test_hostile_addresses_in_json_are_refused(self, address: Address, value: bytes) -> None:
        """JSON can spell what UTF-8 cannot: that makes no user either."""
        sent = request(b"POST /users", JSON, body=b'{"email": "%b"}' % value)
        assert refusal(await ask(address, sent)) == WRONG_EMAIL

    @pytest.mark.parametrize(
        ("content_type", "body"),
        [
            (FORM, b"distance=abc&distance=def"),
            (JSON, b'{"distance": "abc", "distance": "def"}'),
        ],
    )
    async def test_a_parameter_given_twice_is_no_way_around_a_check(
        self, address: Address, content_type: bytes, body: bytes
    ) -> None:
        """Whichever of two counts, it is checked."""
        assert refusal(await ask(address, new_ride(content_type, body=body))) == WRONG_DISTANCE


class TestBodies:
    """Bodies that are not what their headers say."""

    @pytest.mark.parametrize(
        "content_type",
        [
            b"text/plain", b"text/json", b"application/xml", b"application/octet-stream", b"application/json2",
            b"multipart/mixed; boundary=B", b"", b"/", b";;;", b"application/json\xff",
            pytest.param(b"x" * 4_000, id="4,000 letters"),
        ],
    )  # fmt: skip
    async def test_other_content_types_hold_no_parameters(self, address: Address, content_type: bytes) -> None:
        """What is neither a form nor JSON is not looked into."""
        body = b'{"distance": 1}'
        assert refusal(await ask(address, new_ride(b"Content-Type: " + content_type, body=body))) == NO_DISTANCE

    async def test_a_body_without_content_type_holds_no_parameters(self, address: Address) -> None:
        """A type is not guessed from the content."""
        assert refusal(await ask(address, new_ride(body=b"distance=1"))) == NO_DISTANCE

    @pytest.mark.parametrize(
        "body",
        [
            b"", b" ", b"{", b"{]", b'{"distance": 1', b'{"distance": 1}}', b'{"distance": 1}\0', b"\0",
            b"distance=1", b"'", b'{"distance": "1\0"}', b'{"distance": "\xff"}', b"\xff\xfe",
            b'\xef\xbb\xbf{"distance": 1}',
            b'{"distance": "\\ud8"}', b'{"distance": .5}', b'{"distance": +1}', b'{"distance": 01}',
            pytest.param(b"[" * 60_000, id="60,000 lists in each other"),
            pytest.param(b'{"distance":' * 5_000, id="5,000 objects in each other"),
            pytest.param(b'{"distance": %b}' % (b"9" * 5_000), id="5,000 digits"),
        ],
    )  # fmt: skip
    async def test_what_is_no_json_is_refused(self, address: Address, body: bytes) -> None:
        """Cut off, misspelt, too deep, with numbers too long or not in UTF-8: it cannot be read."""
        assert refusal(await ask(address, new_ride(JSON, body=body))) == NO_JSON

    @pytest.mark.parametrize("body", [b"distance=\xff", b"\xff=1", b"\xed\xa0\x80", b"distance=1&\xc0\x80"])
    async def test_a_form_that_is_not_utf_8_is_refused(self, address: Address, body: bytes) -> None:
        """Bytes that are no text are no form."""
        assert refusal(await ask(address, new_ride(FORM, body=body))) == NO_FORM

    @pytest.mark.parametrize("value", [b"%00", b"1%00", b"%", b"%zz", b"%u0031", b"%FF", b"1%FF", b"%ED%A0%80"])
    async def test_a_value_that_is_badly_percent_encoded_is_refused(self, address: Address, value: bytes) -> None:
        """What does not decode to a number is none."""
        assert refusal(await ask(address, new_ride(FORM, body=b"distance=" + value))) in {NO_FORM, WRONG_DISTANCE}

    @pytest.mark.parametrize(
        "charset",
        [
            b"bogus",
            b"hex",
            b"rot13",
            b"undefined",
            b"utf-32",
            b"\xff",
            b'"a\\0b"',
            b"../../x",
            pytest.param(b"c" * 4_000, id="4,000 letters"),
        ],
    )
    @pytest.mark.parametrize(
        ("content_type", "text"), [(JSON, NO_JSON), (FORM, NO_FORM)], ids=["JSON", "form"]
    )  # fmt: skip
    async def test_a_charset_that_cannot_be_decoded_is_refused(
        self, address: Address, content_type: bytes, text: tuple[int, str], charset: bytes
    ) -> None:
        """An unknown charset, or one that the body is not in, makes the body unreadable."""
        sent = new_ride(content_type + b"; charset=" + charset, body=b'{"distance": 1}')
        assert refusal(await ask(address, sent)) == text

    async def test_an_escape_that_its_charset_cannot_hold_is_refused(self, address: Address) -> None:
        """A percent escape that fails to decode is not taken for too many fields."""
        sent = new_ride(FORM + b"; charset=idna", body=b"distance=%FF")
        assert refusal(await ask(address, sent))[0] in {400, 422}

    async def test_a_form_of_many_fields_is_not_called_too_large(self, address: Address) -> None:
        """Whatever is wrong with it, it is not that a few kilobytes were too many."""
        assert refusal(await ask(address, new_ride(FORM, body=b"a&" * 3_000))) != TOO_LARGE

    @pytest.mark.parametrize(
        ("encoding", "body"),
        [
            (b"gzip", b"distance=1"),
            (b"deflate", b"distance=1"),
            (b"br", b"distance=1"),
            (b"zstd", b"distance=1"),
            pytest.param(b"gzip", gzip.compress(b"distance=abc") + b"junk", id="gzip-and junk"),
            pytest.param(b"gzip", b"\x1f\x8b\x08" + b"\0" * 20, id="gzip-of nothing"),
        ],
    )  # fmt: skip
    async def test_a_body_that_cannot_be_decompressed_is_refused(
        self, address: Address, encoding: bytes, body: bytes
    ) -> None:
        """A body that is not compressed as it says is the client's mistake."""
        sent = new_ride(FORM, b"Content-Encoding: " + encoding, body=body)
        assert refusal(await ask(address, sent))[0] in BAD_BODY

    async def test_a_compressed_value_is_checked_like_any_other(self, address: Address) -> None:
        """Compression, where it is understood, is no way around a check."""
        sent = new_ride(FORM, b"Content-Encoding: gzip", body=gzip.compress(b"distance=abc"))
        assert refusal(await ask(address, sent))[0] in {415, 422}


CHARSET = b'Content-Disposition: form-data; name="_charset_"\r\n\r\n'
STRANGE_PARTS = {
    "none": [],
    "empty": [b""],
    "without headers": [b"\r\n1.0"],
    "without a name": [b"Content-Disposition: form-data\r\n\r\n1.0"],
    "attachment": [b"Content-Disposition: attachment\r\n\r\n1.0"],
    "of another name": [b'Content-Disposition: form-data; name="other"\r\n\r\n1.0'],
    "without a body": [DISTANCE],
    "with an empty body": [DISTANCE + b"\r\n"],
    "NUL": [DISTANCE + b"\r\n1\0"],
    "not UTF-8": [DISTANCE + b"\r\n\xff"],
    "no number": [DISTANCE + b"\r\nabc"],
    "twice no number": [DISTANCE + b"\r\nabc", DISTANCE + b"\r\ndef"],
    "file": [UPLOAD + b"\r\n1.0"],
    "empty file": [UPLOAD + b"\r\n"],
    "typed file": [UPLOAD + b"Content-Type: application/gpx+xml\r\n\r\n" + b"x" * 50_000],
    "bytes": [DISTANCE + b"Content-Type: application/octet-stream\r\n\r\n1.0"],
    "unknown charset": [DISTANCE + b"Content-Type: text/plain; charset=bogus\r\n\r\n1.0"],
    "nested": [DISTANCE + b"Content-Type: multipart/mixed; boundary=C\r\n\r\n--C\r\n\r\n1.0\r\n--C--"],
    "nested without boundary": [DISTANCE + b"Content-Type: multipart/mixed\r\n\r\n1.0"],
    "unknown encoding": [DISTANCE + b"Content-Transfer-Encoding: bogus\r\n\r\n1.0"],
    "wrong base64": [DISTANCE + b"Content-Transfer-Encoding: base64\r\n\r\nabcde"],
    "file in unknown encoding": [UPLOAD + b"Content-Transfer-Encoding: bogus\r\n\r\n1.0"],
    "file in wrong base64": [UPLOAD + b"Content-Transfer-Encoding: base64\r\n\r\nabcde"],
    "default charset unknown": [CHARSET + b"bogus", DISTANCE + b"\r\n1.0"],
    "default charset not UTF-8": [CHARSET + b"\xff", DISTANCE + b"\r\n1.0"],
    "default charset too long": [CHARSET + b"c" * 100, DISTANCE + b"\r\n1.0"],
    "header without colon": [b"no header\r\n\r\n1.0"],
    "header with NUL": [b"X\0: y\r\n" + DISTANCE + b"\r\n1.0"],
    "header not ASCII": [b"\xff: y\r\n" + DISTANCE + b"\r\n1.0"],
    "header too long": [b"X: " + b"y" * 20_000 + b"\r\n" + DISTANCE + b"\r\n1.0"],
    "too many headers": [b"X: y\r\n" * 1_000 + DISTANCE + b"\r\n1.0"],
    "too many": [b'Content-Disposition: form-data; name="a"\r\n\r\n1'] * 1_010,
}


class TestMultipart:
    """Multipart bodies, which only browsers send."""

    @pytest.mark.parametrize("parts", STRANGE_PARTS.values(), ids=STRANGE_PARTS)
    async def test_strange_parts_are_refused(self, address: Address, parts: list[bytes]) -> None:
        """Files, parts without a name or in each other, unknown encodings, broken headers: no distance in it."""
        answer = await ask(address, new_ride(MULTIPART, body=multipart(*parts)))
        assert refusal(answer)[0] in BAD_BODY

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"junk",
            b"--B",
            b"--B\r\n",
            b"--B--",
            b"--B\r\n" + DISTANCE,
            b"--B\r\n" + DISTANCE + b"\r\n1.0",
            b"\0",
        ],
    )
    async def test_a_body_that_is_cut_off_is_refused(self, address: Address, body: bytes) -> None:
        """What ends before its last boundary is not complete."""
        assert refusal(await ask(address, new_ride(MULTIPART, body=body)))[0] in BAD_BODY

    @pytest.mark.parametrize("parameter", [b"", b"; boundary=", b"; boundary=\xff", b"; boundary=" + b"B" * 200])
    async def test_an_impossible_boundary_is_refused(self, address: Address, parameter: bytes) -> None:
        """Without a boundary there are no parts."""
        sent = new_ride(b"Content-Type: multipart/form-data" + parameter, body=multipart(DISTANCE + b"\r\n1.0"))
        assert refusal(await ask(address, sent))[0] in BAD_BODY


class TestLargeBodies:
    """Bodies of more than 64 KiB."""

    @pytest.mark.parametrize("framing", ["length", "chunks"])
    @pytest.mark.parametrize(
        ("content_type", "body"),
        [
            (JSON, b'{"distance": "%b"}' % (b"x" * MAX_BODY_BYTES)),
            (FORM, b"distance=" + b"1" * MAX_BODY_BYTES),
        ],
        ids=["JSON", "form"],
    )
    async def test_they_are_refused(
        self, address: Address, framing: str, content_type: bytes, body: bytes
    ) -> None:
        """However it is sent, a body is read up to its limit and no further."""
        assert refusal(await ask(address, framed(framing, content_type, body))) == TOO_LARGE

    @pytest.mark.parametrize("framing", ["length", "chunks"])
    @pytest.mark.parametrize(
        "parts",
        [
            [DISTANCE + b"\r\n" + b"1" * MAX_BODY_BYTES],
            [UPLOAD + b"\r\n" + b"1" * MAX_BODY_BYTES],
            [*[DISTANCE + b"\r\n1"] * 900, UPLOAD + b"\r\n" + b"1" * 20_000],
        ],
        ids=["field", "file", "parts"],
    )
    async def test_they_are_refused_in_parts_too(self, address: Address, framing: str, parts: list[bytes]) -> None:
        """A body in parts is read no further either, if it is read at all."""
        answer = await ask(address, framed(framing, MULTIPART, multipart(*parts)))
        assert refusal(answer)[0] in {413, 415, 422}

    async def test_a_body_that_grows_too_large_is_refused(self, address: Address) -> None:
        """The limit holds for what comes out of a compressed body."""
        sent = new_ride(FORM, b"Content-Encoding: gzip", body=gzip.compress(b"distance=" + b"1" * 10_000_000))
        assert refusal(await ask(address, sent))[0] in {413, 415}

    async def test_a_body_is_refused_before_it_has_come_in_full(self, address: Address) -> None:
        """The server does not wait for a gigabyte to refuse it."""
        sent = new_ride(FORM, b"Content-Length: 1000000000", body=b"x" * (MAX_BODY_BYTES + 1))
        assert refusal(await ask(address, sent)) == TOO_LARGE

    async def test_a_body_of_just_the_limit_is_read(self, address: Address, user: bytes) -> None:
        """64 KiB are allowed."""
        body = b'{"distance": 1}'.ljust(MAX_BODY_BYTES)
        assert (await ask(address, new_ride(user, JSON, body=body))).status == 201


class TestHeaders:
    """Headers that the API itself reads."""

    @pytest.mark.parametrize(
        "credentials",
        [
            b"\xff@example.com", b"a@\xed\xa0\x80", b"a@b\xc2\x85", b"a@b\tc", b"' OR 1=1 --", b"%00@b",
            b"Basic YTpi",
            pytest.param(b"a@" + b"b" * 4_000, id="4,000 letters"),
        ],
    )  # fmt: skip
    async def test_hostile_credentials_are_invalid(self, address: Address, credentials: bytes) -> None:
        """What cannot be an address belongs to no user."""
        answer = await ask(address, request(b"GET /rides/1", b"Authorization: " + credentials))
        assert refusal(answer) == UNKNOWN_USER

    async def test_of_two_credentials_none_is_believed_unchecked(self, address: Address, user: bytes) -> None:
        """A second Authorization header does not replace the first."""
        answer = await ask(address, request(b"GET /rides", b"Authorization: " + UNKNOWN, user))
        assert refusal(answer)[0] in {400, 401}

    @pytest.mark.parametrize(
        "key",
        [
            b"", b" ", b"\xff", b"\xed\xa0\x80", b"a\tb", b"a\xc2\x85b", b"a\xe2\x80\xa8b",
            pytest.param(b"k" * 256, id="256 letters"),
        ],
    )  # fmt: skip
    async def test_hostile_idempotency_keys_are_refused(self, address: Address, user: bytes, key: bytes) -> None:
        """What Postgres cannot store, or people cannot read, is no key."""
        answer = await ask(address, new_ride(user, FORM, b"Idempotency-Key: " + key, body=b"distance=1"))
        assert refusal(answer) == WRONG_KEY

    @pytest.mark.parametrize(
        "host",
        [
            b"evil.example", b"localhost.evil.example", b"evil.example:5005", b"notlocalhost", b"", b"\xff",
            b"localhost@evil.example", b"127.0.0.1.evil.example", b"[::1].evil.example", b"2130706433", b"[evil]",
            b"[", b"a]b",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("target", [b"GET /livez", b"GET /nowhere", b"POST /rides", b"GET /openapi.json"])
    async def test_unknown_hosts_are_refused(self, address: Address, target: bytes, host: bytes) -> None:
        """A name that another site may have pointed here is refused, on any path."""
        status, text = refusal(await ask(address, request(target, b"Host: " + host)))
        assert (status, text[:6], text[-20:]) == (421, "Host '", " is not served here.")

    @pytest.mark.parametrize(
        "host",
        [
            b"localhost", b"localhost:5005", b"LOCALHOST", b"localhost.", b"127.0.0.1", b"127.0.0.1:5005",
            b"[::1]", b"[::1]:5005", b"rides.example", b"Rides.Example.:80",
        ],
    )  # fmt: skip
    async def test_known_hosts_are_answered(self, address: Address, host: bytes) -> None:
        """The machine itself and the names allowed are served, with any port."""
        assert (await ask(address, request(b"GET /livez", b"Host: " + host))).status == 200

    @pytest.mark.parametrize(
        "token", [b"1~\xff", b"\xc3\xa4", b"a\tb", b"\x1b[31m", b"1~1-gu8rxrjtrj~0/1~0/1\xa0"]
    )
    async def test_hostile_tokens_are_refused(self, address: Address, token: bytes) -> None:
        """What is no token is not repeated, neither to the client nor in the log."""
        answer = await ask(address, request(b"GET /rides/1", b"Rocket-Session: " + token))
        assert refusal(answer) in {(400, "The session token in Rocket-Session is invalid."), NOT_HTTP}

    @pytest.mark.parametrize("method", [b"OPTIONS", b"GET", b"POST"])
    @pytest.mark.parametrize("path", [b"/rides", b"/rides/1", b"/users", b"/livez", b"/openapi.json", b"/nowhere"])
    async def test_pages_of_other_sites_are_let_in_nowhere(
        self, address: Address, method: bytes, path: bytes
    ) -> None:
        """No answer lets a browser show it to another origin, nor send what a form could not."""
        answer = await ask(
            address,
            request(
                method + b" " + path,
                b"Origin: https://evil.example",
                b"Access-Control-Request-Method: GET",
                b"Access-Control-Request-Headers: Authorization",
            ),
        )
        assert [name for name in answer.headers if name.lower().startswith("access-control")] == []


class TestTargets:
    """Paths, queries and methods."""

    @pytest.mark.parametrize("path", [b"/rides/1%0d%0aX-Injected:%201", b"/%0d%0aX-Injected:%201"])
    async def test_a_target_writes_no_headers(self, address: Address, path: bytes) -> None:
        """What is repeated of it is repeated in JSON."""
        answer = await ask(address, request(b"GET " + path))
        assert refusal(answer)[0] in {401, 404}
        assert answer.headers["X-Injected"] is None

    @pytest.mark.parametrize(
        "given_id",
        [
            b"%00", b"1%00", b"%FF", b"%ED%A0%80", b"%C0%80", b"%", b"%zz", b"%0A", b"1%0A", b"%2F", b"1;2", b"'",
            b"%D9%A3", b"..%2F1", b"1.", b"$1", b"\\",
            pytest.param(b"9" * 4_000, id="4,000 digits"),
        ],
    )  # fmt: skip
    async def test_hostile_ids_are_not_found(self, address: Address, user: bytes, given_id: bytes) -> None:
        """What is no number is no ride's."""
        status, text = refusal(await ask(address, request(b"GET /rides/" + given_id, user)))
        assert (status, text[:27]) == (404, "Object of type 'ride' with ")

    @pytest.mark.parametrize(
        "value",
        [
            b"%00", b"1%00", b"%FF", b"%ED%A0%80", b"%", b"%zz", b"%D9%A3", b"'", b"1;2",
            pytest.param(b"1" * 4_000, id="4,000 digits"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("name", ["limit", "before"])
    async def test_hostile_query_parameters_are_refused(
        self, address: Address, user: bytes, name: str, value: bytes
    ) -> None:
        """What is not the number that it should be is a 422 that names the parameter."""
        status, text = refusal(await ask(address, request(b"GET /rides?%b=%b" % (name.encode(), value), user)))
        assert (status, text.partition(" must be ")[0]) == (422, f"Parameter '{name}'")

    async def test_a_query_parameter_given_twice_is_no_way_around_a_check(
        self, address: Address, user: bytes
    ) -> None:
        """Whichever of two counts, it is checked."""
        assert refusal(await ask(address, request(b"GET /rides?limit=0&limit=101", user)))[0] == 422

    @pytest.mark.parametrize(
        "path",
        [
            "/",
            "//",
            "/nowhere",
            "/rides/",
            "//rides",
            "/rides/1/2",
            "/rides/../livez",
            "/RIDES",
            "/livez/",
            "/é",
            "*",
        ],
    )
    async def test_unknown_paths_are_not_found(self, address: Address, path: str) -> None:
        """A path is there, or it is a 404 that names it."""
        method = b"OPTIONS" if path == "*" else b"GET"
        answer = await ask(address, request(method + b" " + quote(path, safe="/*").encode()))
        assert refusal(answer) == (404, f"Path '{path}' was not found.")

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            ("DELETE", "/rides/1", "GET"), ("POST", "/rides/1", "GET"), ("PUT", "/rides", "GET,POST"),
            ("PATCH", "/users", "POST"), ("GET", "/users", "POST"), ("POST", "/livez", "GET"),
            ("OPTIONS", "/metrics", "GET"), ("TRACE", "/replicas", "GET"), ("PROPFIND", "/readyz", "GET"),
        ],
    )  # fmt: skip
    async def test_other_methods_are_not_allowed(
        self, address: Address, method: str, path: str, allowed: str
    ) -> None:
        """A method that a path does not know is a 405 that says which it knows."""
        answer = await ask(address, request(f"{method} {path}".encode()))
        assert refusal(answer) == (405, f"Method '{method}' is not allowed here.")
        assert answer.headers["Allow"] == allowed

    async def test_there_is_no_proxy_here(self, address: Address) -> None:
        """CONNECT opens no tunnel."""
        assert refusal(await ask(address, request(b"CONNECT example.com:443")))[0] in {400, 404, 405}

    @pytest.mark.parametrize("protocol", [b"websocket", b"h2c", b"TLS/1.0"])
    async def test_no_other_protocol_is_spoken(self, address: Address, protocol: bytes) -> None:
        """A request to change the protocol is answered as if it had not been made."""
        answer = await ask(
            address, new_ride(FORM, b"Connection: Upgrade", b"Upgrade: " + protocol, body=b"distance=abc")
        )
        assert refusal(answer) == WRONG_DISTANCE


NOT_REQUESTS = {
    "NUL in a value": request(b"GET /livez", b"X: a\0b"),
    "NUL in a name": request(b"GET /livez", b"X\0: a"),
    "NUL in the credentials": request(b"GET /livez", b"Authorization: a\0@b"),
    "NUL in the key": new_ride(FORM, b"Idempotency-Key: a\0b", body=b"distance=1"),
    "NUL in the host": request(b"GET /livez", b"Host: localhost\0"),
    "DEL in a value": request(b"GET /livez", b"X: a\x7fb"),
    "space in a name": request(b"GET /livez", b"X y: a"),
    "header without colon": request(b"GET /livez", b"no colon"),
    "header without name": request(b"GET /livez", b": no name"),
    "folded header": request(b"GET /livez", b"X: a\r\n folded"),
    "value too long": request(b"GET /livez", b"X: " + b"a" * 9_000),
    "name too long": request(b"GET /livez", b"a" * 9_000 + b": X"),
    "too many headers": request(b"GET /livez", *[b"X: a"] * 200),
    "two hosts": request(b"GET /livez", b"Host: localhost", b"Host: evil.example"),
    "no host": b"GET /livez HTTP/1.1\r\n\r\n",
    "two content types": new_ride(JSON, FORM, body=b"distance=1"),
    "space in the method": request(b"G T /livez"),
    "NUL in the method": request(b"GE\0T /livez"),
    "method not ASCII": request(b"\xff /livez"),
    "unknown method": request(b"FOO /livez"),
    "method in lower case": request(b"get /livez"),
    "path without slash": request(b"GET livez"),
    "no path": request(b"GET "),
    "path not ASCII": request(b"GET /rides/\xff"),
    "NUL in the path": request(b"GET /rides/\0"),
    "query not ASCII": request(b"GET /rides?limit=\xff"),
    "NUL in the query": request(b"GET /rides?limit=\0"),
    "space in the path": request(b"GET /rides/1 2"),
    "path too long": request(b"GET /" + b"a" * 9_000),
    "URL with a broken host": request(b"GET http://[::1/livez"),
    "URL with an impossible port": request(b"GET http://localhost:99999999/livez"),
    "HTTP/9.9": b"GET /livez HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "HTTP/1.x": b"GET /livez HTTP/1.x\r\nHost: localhost\r\n\r\n",
    "HTTQ/1.1": b"GET /livez HTTQ/1.1\r\nHost: localhost\r\n\r\n",
    "version not ASCII": b"GET /livez \xff\r\nHost: localhost\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50,
    "SSH": b"SSH-2.0-OpenSSH_9.9\r\n",
    "NULs": b"\0" * 50,
    "ones": b"\xff" * 50,
    "negative length": new_ride(b"Content-Length: -1", body=b"distance=1"),
    "length that is no number": new_ride(b"Content-Length: abc", body=b"distance=1"),
    "length that is no number to others": new_ride(b"Content-Length: 1_0", body=b"distance=1"),
    "length beyond 64 bits": new_ride(b"Content-Length: " + b"9" * 30, body=b"distance=1"),
    "two lengths": new_ride(b"Content-Length: 1", b"Content-Length: 2", body=b"distance=1"),
    "length and chunks": new_ride(b"Content-Length: 5", CHUNKED, body=b"0\r\n\r\n"),
    "chunk size that is no number": new_ride(CHUNKED, body=b"zz\r\n"),
    "negative chunk size": new_ride(CHUNKED, body=b"-5\r\nabcde\r\n0\r\n\r\n"),
    "chunk size too small": new_ride(CHUNKED, body=b"5\r\nabcdefgh\r\n0\r\n\r\n"),
    "chunk size beyond 64 bits": new_ride(CHUNKED, body=b"f" * 30 + b"\r\nabc"),
    "unknown transfer encoding": new_ride(b"Transfer-Encoding: gzip", body=b"distance=1"),
}


HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
SMUGGLED = {
    "length and chunks": new_ride(b"Content-Length: %d" % (5 + len(HIDDEN)), CHUNKED, body=b"0\r\n\r\n" + HIDDEN),
    "chunks and length": new_ride(CHUNKED, b"Content-Length: 5", body=b"0\r\n\r\n" + HIDDEN),
    "two lengths": new_ride(b"Content-Length: 0", b"Content-Length: %d" % len(HIDDEN), body=HIDDEN),
    "a list of lengths": new_ride(b"Content-Length: 0, %d" % len(HIDDEN), body=HIDDEN),
    "a signed length": new_ride(b"Content-Length: +0", body=HIDDEN),
    "a length with a space": new_ride(b"Content-Length: 0 0", body=HIDDEN),
    "a space before the colon": new_ride(b"Transfer-Encoding : chunked", body=b"0\r\n\r\n" + HIDDEN),
    "an encoding twice": new_ride(CHUNKED, CHUNKED, body=b"0\r\n\r\n" + HIDDEN),
    "chunked, and then not": new_ride(b"Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n" + HIDDEN),
    "not quite chunked": new_ride(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n" + HIDDEN),
    "chunked in quotes": new_ride(b'Transfer-Encoding: "chunked"', body=b"0\r\n\r\n" + HIDDEN),
    "a folded encoding": new_ride(b"Transfer-Encoding:\r\n chunked", body=b"0\r\n\r\n" + HIDDEN),
    "a chunk of hexadecimal prefix": new_ride(CHUNKED, body=b"0x0\r\n\r\n" + HIDDEN),
    "a signed chunk": new_ride(CHUNKED, body=b"+0\r\n\r\n" + HIDDEN),
    "a chunk after a space": new_ride(CHUNKED, body=b" 0\r\n\r\n" + HIDDEN),
    "a chunk with a bare line feed": new_ride(CHUNKED, body=b"0\n\n" + HIDDEN),
    "a header with a bare line feed": new_ride(b"X: y\nContent-Length: 0", b"Content-Length: 5", body=HIDDEN),
    "a header with a bare carriage return": new_ride(b"X: y\rContent-Length: 0", body=HIDDEN),
}
"""Requests of which some see one, and others two."""


class TestSmuggling:
    """What a proxy before us might have seen otherwise."""

    @pytest.mark.parametrize("sent", SMUGGLED.values(), ids=SMUGGLED)
    async def test_an_ambiguous_request_is_refused_and_nothing_behind_it_is_read(
        self, address: Address, sent: bytes
    ) -> None:
        """It is unknown where the next request begins, so there is none."""
        async with connection(address) as (reader, writer):
            writer.write(sent)
            assert refusal(await answer_from(reader)) == NOT_HTTP
            with contextlib.suppress(ConnectionError):
                assert b"hidden" not in await reader.read()


class TestNotHttp:
    """Bytes that are no request."""

    @pytest.mark.parametrize("sent", NOT_REQUESTS.values(), ids=NOT_REQUESTS)
    async def test_it_is_a_400_in_json(self, address: Address, sent: bytes) -> None:
        """What cannot be parsed is refused in the API's own form, without repeating any of it."""
        assert refusal(await ask(address, sent)) == NOT_HTTP

    async def test_the_connection_is_closed_after_it(self, address: Address) -> None:
        """It is unknown where the next request would begin."""
        async with connection(address) as (reader, writer):
            writer.write(b"\0\r\n\r\n" + request(b"GET /livez"))
            assert refusal(await answer_from(reader)) == NOT_HTTP
            assert await reader.read() == b""

    @pytest.mark.parametrize("content_type", [JSON, FORM, MULTIPART])
    @pytest.mark.parametrize("chunk", [b"zz\r\n", b"5\r\nabcdefgh\r\n0\r\n\r\n"])
    @pytest.mark.parametrize("bounds", [Bounds(body_s=0.1)])
    async def test_chunks_that_go_wrong_later_are_refused(
        self, own_address: Address, content_type: bytes, chunk: bytes
    ) -> None:
        """A body that stops being one while it is waited for is the client's mistake, or never comes."""
        async with connection(own_address) as (reader, writer):
            writer.write(new_ride(content_type, CHUNKED, b"Expect: 100-continue"))
            assert (await answer_from(reader)).status == 100
            writer.write(chunk)
            assert refusal(await answer_from(reader))[0] in BAD_BODY

    @pytest.mark.parametrize("content_type", [JSON, FORM, MULTIPART])
    @pytest.mark.parametrize("framing", [b"Content-Length: 100", CHUNKED])
    async def test_a_client_that_goes_away_is_no_error(
        self, own_address: Address, content_type: bytes, framing: bytes
    ) -> None:
        """A client that hangs up before the body is complete leaves nothing in the log."""
        async with connection(own_address) as (reader, writer):
            writer.write(new_ride(content_type, framing, b"Expect: 100-continue"))
            assert (await answer_from(reader)).status == 100
            writer.write(b"5\r\n")
            writer.close()
            await writer.wait_closed()
        # The server has seen it by the time it answers another client.
        assert (await ask(own_address, request(b"GET /livez"))).status == 200


class TestExpectations:
    """`Expect`."""

    async def test_a_client_that_asks_first_may_continue(self, address: Address) -> None:
        """The interim answer comes before the body, and the answer after it."""
        body = b"distance=abc"
        async with connection(address) as (reader, writer):
            writer.write(new_ride(FORM, b"Expect: 100-Continue", b"Content-Length: %d" % len(body)))
            assert (await answer_from(reader)).status == 100
            writer.write(body)
            assert refusal(await answer_from(reader)) == WRONG_DISTANCE

    @pytest.mark.parametrize("expectation", [b"nonsense", b"200-ok", b"\xff", b"100-continue, nonsense"])
    @pytest.mark.parametrize(
        "target", [b"POST /rides", b"GET /rides/1", b"GET /livez", b"GET /nowhere", b"DELETE /rides"]
    )
    async def test_other_expectations_cannot_be_met(
        self, address: Address, target: bytes, expectation: bytes
    ) -> None:
        """Anything else is a 417 on every path, known or not, that does not repeat it."""
        answer = await ask(address, request(target, b"Expect: " + expectation))
        assert refusal(answer) == (417, "Expectation Failed.")

    async def test_an_unknown_host_is_refused_all_the_same(self, address: Address) -> None:
        """Who asks first is checked like others."""
        async with connection(address) as (reader, writer):
            writer.write(new_ride(FORM, b"Host: evil.example", b"Expect: 100-continue", body=b"distance=1"))
            answer = await answer_from(reader)
            if answer.status == 100:
                answer = await answer_from(reader)
        assert refusal(answer)[0] == 421


FRAGMENTS = [
    b"distance", b"=", b"&", b"%", b"%00", b"%FF", b"\0", b"\xff", b"\xc3\xa4", b"1", b"1.5", b"e", b"-", b" ",
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\u0000", b"\\ud800", b"null", b"--B", b"--", b"\r\n", b"\r\n\r\n",
    b"--B\r\n" + DISTANCE + b"\r\n", b"--B\r\n" + UPLOAD + b"\r\n", b"--B--\r\n", DISTANCE, UPLOAD,
    b"Content-Transfer-Encoding: base64\r\n", b"Content-Type: text/plain; charset=\xff\r\n",
    b'--B\r\nContent-Disposition: form-data; name="_charset_"\r\n\r\n',
]  # fmt: skip
"""What bodies are made of, so that random ones get far."""

BODIES = st.binary(max_size=200) | st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(b"".join)
TYPES = st.sampled_from([JSON, FORM, MULTIPART, FORM + b"; charset=utf-16", JSON + b"; charset=utf-7", b"X: y"])
ONE_LINE = st.binary(max_size=60).map(lambda value: value.translate(None, b"\r\n"))

NUMBERS = (
    st.integers(-1, 102).map(str)
    | st.integers(BIGINT_MAX - 1, BIGINT_MAX + 1).map(str)
    | st.text(max_size=8)
    | st.text("0123456789+-. eE_", max_size=8)
)
_PLAIN_NUMBER = re.compile(r"[-+.0-9eE]*")


def _is_from(text: str, least: int, most: int) -> bool:
    return re.fullmatch("[0-9]{1,19}", text) is not None and least <= int(text) <= most


anything = settings(
    max_examples=80,
    deadline=None,  # the first example opens connections
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the server keeps nothing between two examples
)


class TestAnything:
    """Random input is a 4xx."""

    @anything
    @given(content_type=TYPES, body=BODIES)
    async def test_any_body_is_refused(self, address: Address, content_type: bytes, body: bytes) -> None:
        """No bytes, of any content type, create a ride for an unknown user."""
        refusal(await ask(address, new_ride(content_type, body=body)))

    @anything
    @given(given_id=st.text(max_size=40))
    async def test_any_text_as_an_id_is_not_found(self, address: Address, given_id: str) -> None:
        """No text is the ID of a ride of an unknown user."""
        path = "/rides/" + quote(given_id, safe="", errors="surrogatepass")
        assert refusal(await ask(address, request(b"GET " + path.encode())))[0] in {401, 404}

    @anything
    @given(target=ONE_LINE)
    async def test_any_bytes_as_a_target_are_refused(self, address: Address, target: bytes) -> None:
        """No bytes behind the path of rides are one."""
        assert refusal(await ask(address, request(b"GET /rides/" + target)))[0] in {400, 401, 404}

    @anything
    @given(credentials=ONE_LINE)
    async def test_any_bytes_as_credentials_are_refused(self, address: Address, credentials: bytes) -> None:
        """No bytes are credentials, unless a user signed up with them."""
        answer = await ask(address, request(b"GET /rides/1", b"Authorization: " + credentials))
        assert refusal(answer)[0] in {400, 401}

    @anything
    @given(limit=NUMBERS, before=NUMBERS)
    async def test_any_query_is_right_or_refused(self, address: Address, limit: str, before: str) -> None:
        """What is within its bounds gets as far as the credentials, and nothing else does."""
        query = urlencode({"limit": limit, "before": before}, errors="surrogatepass").encode()
        right = _is_from(limit, 1, 100) and _is_from(before, 1, BIGINT_MAX)
        assert refusal(await ask(address, request(b"GET /rides?" + query)))[0] == (401 if right else 422)

    @anything
    @given(header=st.sampled_from([b"Rocket-Session", b"Idempotency-Key", b"Host", b"Expect"]), value=ONE_LINE)
    async def test_any_bytes_in_a_header_are_refused(self, address: Address, header: bytes, value: bytes) -> None:
        """No bytes in a header that we read create a ride for an unknown user."""
        sent = new_ride(FORM, header + b": " + value, body=b"distance=1")
        assert refusal(await ask(address, sent))[0] in {400, 401, 417, 421}

    @anything
    @given(value=st.floats() | st.integers() | st.text(max_size=20) | st.booleans() | st.none())
    async def test_any_value_is_a_distance_or_refused(self, address: Address, value: object) -> None:
        """It is a finite number, or a 422."""
        with contextlib.suppress(ValueError, OverflowError):
            number = math.nan if value is None or isinstance(value, bool) else float(value)  # type: ignore[arg-type]
            answer = await ask(address, new_ride(JSON, body=json.dumps({"distance": value}).encode()))
            plain = not isinstance(value, str) or _PLAIN_NUMBER.fullmatch(value.strip())
            assert refusal(answer)[0] == (401 if math.isfinite(number) and plain else 422)

    @anything
    @given(sent=st.binary(max_size=100).filter(lambda sent: sent.strip(b"\r\n")))  # empty lines are waited out
    async def test_any_bytes_as_a_request_are_refused(self, address: Address, sent: bytes) -> None:
        """No bytes that are not meant as HTTP get more than a refusal."""
        assert refusal(await ask(address, sent + b"\r\n\r\n"))[0] in {400, 404, 405, 421}
