"""Positions compare as numbers, and survive every form that they take on their way."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rocket.consistency import Lsn

LARGEST = 2**64 - 1

modest = settings(max_examples=100)

# The edges, where signs and halves meet, are worth more examples than chance gives them.
EDGES = st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, LARGEST - 1, LARGEST])
LSNS = (EDGES | st.integers(0, LARGEST)).map(Lsn)


@given(lsn=LSNS)
@modest
def test_text_survives_the_round_trip(lsn: Lsn) -> None:
    """What is written for an LSN is read as the same LSN."""
    assert lsn == Lsn.parse(str(lsn))
    assert lsn == Lsn.parse(str(lsn).lower())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0/0", 0),
        ("16/B374D848", 0x16_B374D848),
        ("0/FFFFFFFF", 2**32 - 1),
        ("1/0", 2**32),
        ("FFFFFFFF/FFFFFFFF", LARGEST),
    ],
)
def test_text_is_written_and_read_as_postgres_does(text: str, value: int) -> None:
    """Two hexadecimal halves of 32 bits, capital, without leading zeros."""
    assert value == Lsn.parse(text)
    assert text == str(Lsn(value))
    assert text == f"{Lsn(value)}"
    assert f"Lsn.parse('{text}')" == repr(Lsn(value))


@pytest.mark.parametrize("text", ["00000016/B374D848", "16/b374d848", "0016/0B374D84"])
def test_leading_zeros_and_small_letters_are_read(text: str) -> None:
    """Every spelling that Postgres takes for a `pg_lsn` within eight digits a half is read."""
    high, low = text.split("/")

    assert (int(high, 16) << 32) + int(low, 16) == Lsn.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "0",
        "0/",
        "/0",
        "0/0/0",
        "0:0",
        "123456789/0",
        "0/123456789",
        " 0/0",
        "0/0 ",
        "0/0\n",
        "0 /0",
        "0x1/0",
        "G/0",
        "-1/0",
        "0/-1",
        "+1/0",
        "1_0/0",
        "0\\0",
        "0/0\0",
        "NULL",
        "\N{FULLWIDTH DIGIT ONE}/0",
        "\N{ARABIC-INDIC DIGIT ONE}/0",
    ],
)
def test_a_wrong_text_is_refused(text: str) -> None:
    """Nothing but Postgres' own form is an LSN."""
    with pytest.raises(ValueError, match="not an LSN"):
        Lsn.parse(text)


@given(text=st.text(alphabet="0123456789ABCDEFabcdefGx/+-_ \n", max_size=20))
@modest
def test_a_text_is_an_lsn_or_refused(text: str) -> None:
    """No text is taken for something that it is not: what was read is what was written, but for leading zeros."""
    try:
        lsn = Lsn.parse(text)
    except ValueError:
        return
    halves = [half.lstrip("0") or "0" for half in text.upper().split("/")]

    assert "/".join(halves) == str(lsn)


@pytest.mark.parametrize("value", [-1, -(2**63), 2**64, 10**30])
def test_a_number_beyond_64_bits_is_refused(value: int) -> None:
    """An LSN has 64 bits and no sign."""
    with pytest.raises(ValueError, match="64 bits"):
        Lsn(value)


@given(lsn=LSNS)
@modest
def test_wire_survives_the_round_trip(lsn: Lsn) -> None:
    """All 64 bits come back from the wire as they were sent."""
    assert lsn == Lsn.from_wire(lsn.wire)


@given(wire=st.integers(-(2**63), 2**63 - 1))
@modest
def test_every_signed_number_on_the_wire_is_an_lsn(wire: int) -> None:
    """Whatever asyncpg reads for a `pg_lsn` is sent back as the same number."""
    assert wire == Lsn.from_wire(wire).wire


@given(lsn=LSNS)
@modest
def test_wire_is_the_signed_reading_of_the_same_bits(lsn: Lsn) -> None:
    """Only the sign bit is read differently on the wire; the bits stay."""
    (signed,) = struct.unpack(">q", struct.pack(">Q", lsn))

    assert signed == lsn.wire
    assert int is type(lsn.wire)


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ("0/9", "0/10"),
        ("9/0", "10/0"),
        ("0/FFFFFFFF", "1/0"),
        ("2/FFFFFFFF", "10/0"),
        ("7FFFFFFF/FFFFFFFF", "80000000/0"),
    ],
)
def test_order_is_that_of_numbers_not_of_text(lower: str, higher: str) -> None:
    """`0/9` comes before `0/10`, though as text it would come after; and no sign turns the order round."""
    assert Lsn.parse(lower) < Lsn.parse(higher)
    assert [Lsn.parse(lower), Lsn.parse(higher)] == sorted([Lsn.parse(higher), Lsn.parse(lower)])


@given(one=LSNS, other=LSNS)
@modest
def test_order_and_distance_are_those_of_the_byte_positions(one: Lsn, other: Lsn) -> None:
    """LSNs compare as their positions do, and their difference is the bytes between them."""
    assert (int(one) < int(other)) == (one < other)
    assert (int(one) == int(other)) == (one == other)
    assert int(one) - int(other) == one - other


@given(lsn=LSNS)
@modest
def test_unknown_is_above_everything(lsn: Lsn) -> None:
    """No replica can have replayed up to a commit LSN that is not known yet."""
    assert lsn <= Lsn.PENDING
    assert (lsn == Lsn.PENDING) == (str(lsn) == "FFFFFFFF/FFFFFFFF")


def test_unknown_is_what_the_table_says() -> None:
    """The marker has the same value in the program as in `users.min_lsn`, on the wire as well."""
    assert Lsn.parse("FFFFFFFF/FFFFFFFF") == Lsn.PENDING
    assert Lsn.PENDING.wire == -1
