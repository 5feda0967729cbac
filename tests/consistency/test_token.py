"""A session's floors only rise, whatever it does and however its tokens meet; and no other text is a token."""

from __future__ import annotations

import string
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rocket.consistency import Epoch, Incarnation, Lsn, SessionToken, merged, timeline_of

LARGEST = 2**64 - 1

modest = settings(max_examples=150)

EPOCH = Epoch("1-aaaaaaaaaa")
OTHER_EPOCH = Epoch("1-bbbbbbbbbb")

# Few nodes, few lives and small numbers, so that they often meet.
NODES = ["replica0", "replica1"]
INCARNATIONS = [Incarnation("71@1700000000000000"), Incarnation("72@1700000000000001")]
FLOORS = st.sampled_from([0, 1, 2, 3, 4, 5, LARGEST]).map(Lsn)
KNOWN_LSNS = st.integers(0, 6).map(Lsn)
PLACES = st.none() | st.tuples(st.sampled_from(NODES), st.sampled_from(INCARNATIONS))
EVERYWHERE = [(node, life) for node in [*NODES, "replica9"] for life in [*INCARNATIONS, Incarnation("9@9"), None]]


def known(read_floor: Lsn) -> Lsn | None:
    """Return a read floor as tokens have it."""
    return None if read_floor == LARGEST else read_floor


def largest(*read_floors: Lsn | None) -> Lsn | None:
    """Return the largest of read floors, which is that without a bound if there is one."""
    return None if None in read_floors else max(floor for floor in read_floors if floor is not None)


def token_of(
    write_floor: int, read_floor: int = 0, place: tuple[str, Incarnation] | None = None, epoch: Epoch = EPOCH
) -> SessionToken:
    """Return a token; the largest read floor stands for an unbounded one."""
    node, incarnation = place or (None, None)
    return SessionToken(epoch, Lsn(write_floor), known(Lsn(read_floor)), node, incarnation)


TOKENS = st.builds(token_of, FLOORS, FLOORS, PLACES)

# Every token that may be written: the longest names, and LSNs of any size.
ANY_LSN = (st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63, LARGEST - 1, LARGEST]) | st.integers(0, LARGEST)).map(
    Lsn
)
ANY_EPOCH = st.builds(
    lambda timeline, name: Epoch(f"{timeline}-{name}"),
    st.integers(1, 2**32 - 1),
    st.text(string.digits + string.ascii_lowercase, min_size=8, max_size=32),
)
ANY_PLACE = st.none() | st.tuples(
    st.text(string.ascii_letters + string.digits + "_.-", min_size=1, max_size=63),
    st.builds(
        lambda pid, started_at: Incarnation(f"{pid}@{started_at}"),
        st.integers(1, 2**22),
        st.integers(0, 2**63 - 1),
    ),
)
ANY_TOKEN = st.builds(token_of, ANY_LSN, ANY_LSN, ANY_PLACE, ANY_EPOCH)

LONGEST = token_of(
    LARGEST, LARGEST, ("n" * 63, Incarnation("4194304@" + "9" * 19)), Epoch(f"{2**32 - 1}-{'z' * 32}")
)


def floors(token: SessionToken) -> list[Lsn]:
    """Return how much is asked of every replica in every life."""
    return [token.floor_on(node, life) for node, life in EVERYWHERE]


# --- the text ---


@given(token=ANY_TOKEN)
@example(token=LONGEST)
@modest
def test_text_survives_the_round_trip(token: SessionToken) -> None:
    """What is written for a token is read as the same token."""
    assert token == SessionToken.parse(str(token))


@given(token=ANY_TOKEN)
@example(token=LONGEST)
@modest
def test_text_fits_into_a_header(token: SessionToken) -> None:
    """It is short printable ASCII, without anything that separates or quotes what a header or cookie holds."""
    text = str(token)

    assert set(text) <= set(string.ascii_letters + string.digits + "~/-@_.")
    assert len(text) <= 250


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("1~1-aaaaaaaaaa~0/0~0/0", token_of(0)),
        ("1~1-aaaaaaaaaa~16/B374D848~0/1F", token_of(0x16_B374D848, 0x1F)),
        (
            "1~1-aaaaaaaaaa~0/10~FFFFFFFF/FFFFFFFF~replica0~71@1700000000000000",
            token_of(16, LARGEST, ("replica0", INCARNATIONS[0])),
        ),
    ],
)
def test_text_is_readable_to_people(text: str, token: SessionToken) -> None:
    """Version, epoch, write floor, read floor and the replica last read on, in this order."""
    assert text == str(token)
    assert token == SessionToken.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "~",
        "1~1-aaaaaaaaaa~0/0",  # no read floor
        "2~1-aaaaaaaaaa~0/0~0/0",  # another version
        "1~aaaaaaaaaa~0/0~0/0",  # no timeline
        "1~0-aaaaaaaaaa~0/0~0/0",  # there is no timeline 0
        "1~01-aaaaaaaaaa~0/0~0/0",
        "1~-1-aaaaaaaaaa~0/0~0/0",
        "1~12345678901-aaaaaaaaaa~0/0~0/0",
        "1~1-aaaaaaa~0/0~0/0",  # too short a name
        "1~1-AAAAAAAAAA~0/0~0/0",
        "1~1-aaaaaaaaaa~0/0~",
        "1~1-aaaaaaaaaa~0~0/0",
        "1~1-aaaaaaaaaa~0/0~0/123456789",
        "1~1-aaaaaaaaaa~0/0~0/-1",
        "1~1-aaaaaaaaaa~0/0~0/0~replica0",  # a node without an incarnation
        "1~1-aaaaaaaaaa~0/0~0/0~~71@17",
        "1~1-aaaaaaaaaa~0/0~0/0~replica0~None",
        "1~1-aaaaaaaaaa~0/0~0/0~replica 0~71@17",
        "1~1-aaaaaaaaaa~0/0~0/0~r\N{LATIN SMALL LETTER E WITH ACUTE}plica~71@17",
        "1~1-aaaaaaaaaa~0/0~0/0~replica0~71@17~",
        "1~1-aaaaaaaaaa~0/0~0/0\n",
        " 1~1-aaaaaaaaaa~0/0~0/0",
        "1~1-aaaaaaaaaa~0/0~0/0\0",
        "1~1-aaaaaaaaaa~0/0~0/0,1~1-aaaaaaaaaa~0/0~0/0",
        "1~1-aaaaaaaaaa~0/0~0/0;",
        '"1~1-aaaaaaaaaa~0/0~0/0"',
        "\N{FULLWIDTH DIGIT ONE}~1-aaaaaaaaaa~0/0~0/0",
        "1~\N{ARABIC-INDIC DIGIT ONE}-aaaaaaaaaa~0/0~0/0",
        "1~1-aaaaaaaaaa~\N{FULLWIDTH DIGIT ONE}/0~0/0",
        "1~1-aaaaaaaaaa~0/0~0/0~replica0~\N{DEVANAGARI DIGIT ONE}@17",
        "1~1-aaaaaaaaaa~0/0~0/0~replica0~" + "7" * 41,
        "1~1-aaaaaaaaaa~0/0~0/0~" + "n" * 64 + "~71@17",
        "1~1-" + "a" * 33 + "~0/0~0/0",
        "1~" * 1_000_000,
        "9" * 1_000_000,
        "\ud800",
    ],
    ids=lambda text: ascii(text[:60]),
)
def test_a_wrong_text_is_refused(text: str) -> None:
    """Nothing but the form that is written is a token, and the refusal says so and no more."""
    with pytest.raises(ValueError, match=r"\Anot a session token\Z"):
        SessionToken.parse(text)


HOSTILE = st.sampled_from(
    [
        *"\0\n\r\t ,;\"'~/@-_.019fFgG%\\",
        "\N{ARABIC-INDIC DIGIT ONE}",
        "\N{FULLWIDTH DIGIT ONE}",
        "\ud800",
        "9" * 300,
    ]
)


@st.composite
def mutilated(draw: st.DrawFn) -> str:
    """Draw a token's text in which up to three pieces were replaced, left out or put in."""
    text = str(draw(ANY_TOKEN))
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(text)))
        end = draw(st.integers(begin, min(begin + 3, len(text))))
        text = text[:begin] + draw(st.just("") | HOSTILE | st.characters()) + text[end:]
    return text


@given(text=mutilated() | st.text(max_size=60) | st.text(alphabet="01~-/@aF \n", max_size=60))
@settings(max_examples=500)
def test_a_text_is_a_token_or_refused(text: str) -> None:
    """Whatever a client sends is refused, or is a token whose own text means the same."""
    try:
        token = SessionToken.parse(text)
    except ValueError:
        return

    assert token == SessionToken.parse(str(token))
    assert text.count("~") == str(token).count("~")


# --- what a replica must have replayed ---


@given(token=TOKENS)
@modest
def test_the_write_floor_alone_holds_on_the_same_replica_in_the_same_life(token: SessionToken) -> None:
    """Everywhere else, which is everywhere for a session that read on none, both floors hold."""
    both = token.highest_floor
    for place in EVERYWHERE:
        own = token.node is not None and place == (token.node, token.incarnation)

        assert (token.write_floor if own else both) == token.floor_on(*place)


def test_an_unknown_incarnation_equals_nothing_not_even_itself() -> None:
    """Two lives that are not known may be two."""
    token = SessionToken(EPOCH, Lsn(1), Lsn(5), "replica0", None)

    assert token.floor_on("replica0", None) == 5


def test_a_session_that_read_on_no_replica_has_no_own_replica() -> None:
    """Not even one without a name and a life."""
    assert token_of(1, 5).floor_on("", None) == 5


# --- what raises the floors ---


@given(token=TOKENS, flush_lsn=FLOORS)
@modest
def test_a_write_raises_the_write_floor_and_nothing_else(token: SessionToken, flush_lsn: Lsn) -> None:
    """It never lowers a known one, and covers one that could not be told; what was read, and where, stays."""
    after = token.after_write(flush_lsn)

    if token.write_floor == Lsn.PENDING:
        assert replace(token, write_floor=flush_lsn) == after
    else:
        assert replace(token, write_floor=max(token.write_floor, flush_lsn)) == after
        assert all(before <= now for before, now in zip(floors(token), floors(after), strict=True))


@given(token=TOKENS, bound=KNOWN_LSNS, place=st.tuples(st.sampled_from(NODES), st.sampled_from(INCARNATIONS)))
@modest
def test_a_bounded_read_raises_the_read_floor_to_its_bound(
    token: SessionToken, bound: Lsn, place: tuple[str, Incarnation]
) -> None:
    """A known read floor is never lowered, an unknown one becomes known, and the write floor stays."""
    after = token.after_replica_read(*place, bound)
    raised = bound if token.read_floor is None else max(token.read_floor, bound)

    assert token_of(token.write_floor, raised, place) == after


@given(token=TOKENS, place=st.tuples(st.sampled_from(NODES), st.sampled_from(INCARNATIONS)))
@modest
def test_after_a_read_without_a_bound_only_the_same_life_of_that_replica_will_do(
    token: SessionToken, place: tuple[str, Incarnation]
) -> None:
    """There the write floor holds as before, and anywhere else no replica can have replayed enough."""
    after = token.after_replica_read(*place, None)

    assert token_of(token.write_floor, LARGEST, place) == after
    assert {Lsn.PENDING} == {after.floor_on(*other) for other in EVERYWHERE if other != place}
    assert token.write_floor == after.floor_on(*place)


def test_a_bound_that_is_found_later_ends_an_unknown_read_floor() -> None:
    """The replica that showed what could not be bounded has only gone on since: its bound covers that."""
    place = ("replica0", INCARNATIONS[0])
    unknown = token_of(3, 4).after_replica_read(*place, None)

    assert token_of(3, 9, place) == unknown.after_replica_read(*place, Lsn(9))
    assert unknown == unknown.after_replica_read(*place, None)


@given(token=TOKENS, flush_lsn=KNOWN_LSNS)
@modest
def test_a_read_on_the_primary_takes_its_flush_lsn_and_no_node(token: SessionToken, flush_lsn: Lsn) -> None:
    """Nothing beyond that was ever shown; an unknown commit LSN lies below it, one that was known stays."""
    write_floor = flush_lsn if token.write_floor == Lsn.PENDING else token.write_floor

    assert token_of(write_floor, flush_lsn) == token.after_primary_read(flush_lsn)


@given(
    token=TOKENS,
    place=st.tuples(st.sampled_from(NODES), st.sampled_from(INCARNATIONS)),
    bound=st.none() | KNOWN_LSNS,
)
@modest
def test_nothing_changes_the_epoch(token: SessionToken, place: tuple[str, Incarnation], bound: Lsn | None) -> None:
    """The floors are positions of one epoch, so a token never moves to another."""
    after = (
        token.after_write(Lsn(1)).after_replica_read(*place, bound).after_primary_read(Lsn(2)).merged_with(token)
    )

    assert after.epoch == EPOCH


# --- tokens that meet ---


@given(one=TOKENS, other=TOKENS)
@modest
def test_a_merged_token_covers_both(one: SessionToken, other: SessionToken) -> None:
    """No replica in any life may serve it that may not serve each of them."""
    merged = one.merged_with(other)

    for both, first, second in zip(floors(merged), floors(one), floors(other), strict=True):
        assert both >= max(first, second)
    assert max(one.write_floor, other.write_floor) == merged.write_floor
    assert largest(one.read_floor, other.read_floor) == merged.read_floor


@given(one=TOKENS, other=TOKENS)
@modest
def test_a_merged_token_asks_no_more_than_both_need(one: SessionToken, other: SessionToken) -> None:
    """A replica's life on which all that was read was read is kept; of several, only that replicas were read."""
    merged = one.merged_with(other)
    read_on = {(token.node, token.incarnation) for token in (one, other) if token.has_read}

    if read_on:
        if len(read_on) == 1:
            assert read_on == {(merged.node, merged.incarnation)}
        else:
            assert merged.incarnation is None
            assert (merged.node is None) == all(node is None for node, _ in read_on)
    else:
        assert {merged.write_floor} == set(floors(merged))


@given(one=TOKENS, other=TOKENS)
@modest
def test_the_order_in_which_two_tokens_meet_does_not_matter(one: SessionToken, other: SessionToken) -> None:
    """Neither is the first."""
    assert floors(one.merged_with(other)) == floors(other.merged_with(one))


@given(one=TOKENS, other=TOKENS, third=TOKENS)
@modest
def test_the_order_in_which_many_tokens_meet_does_not_matter(
    one: SessionToken, other: SessionToken, third: SessionToken
) -> None:
    """Whichever two are merged first, the three ask the same."""
    left = one.merged_with(other).merged_with(third)
    right = one.merged_with(other.merged_with(third))

    assert floors(left) == floors(right)


@given(one=TOKENS, other=TOKENS)
@modest
def test_meeting_again_changes_nothing(one: SessionToken, other: SessionToken) -> None:
    """A client may send a token as often as it likes."""
    merged = one.merged_with(other)

    assert one == one.merged_with(one)
    assert merged == merged.merged_with(merged)
    assert floors(merged) == floors(merged.merged_with(one))


@given(token=TOKENS, after=TOKENS)
@modest
def test_tokens_of_two_epochs_are_not_merged(token: SessionToken, after: SessionToken) -> None:
    """The same number is another place in another history, even on the same timeline."""
    with pytest.raises(ValueError, match="different epochs"):
        token.merged_with(replace(after, epoch=OTHER_EPOCH))


# --- tokens of several epochs ---

LATER = Epoch("10-aaaaaaaaaa")
"""Later as a number; as text it would come first."""
EPOCHS = st.sampled_from([EPOCH, OTHER_EPOCH, Epoch("2-aaaaaaaaaa"), LATER])
TOKENS_OF_EPOCHS = st.lists(st.builds(token_of, FLOORS, FLOORS, PLACES, EPOCHS), max_size=6)


def test_no_token_is_no_token() -> None:
    """A session that brings none has neither floors nor a past."""
    assert merged([]) == ()


@given(token=TOKENS)
@modest
def test_a_single_token_stays_as_it_is(token: SessionToken) -> None:
    """Whatever it holds."""
    assert merged([token]) == (token,)


@given(tokens=TOKENS_OF_EPOCHS.filter(bool))
@modest
def test_tokens_of_the_latest_epoch_are_merged_and_the_earlier_ones_kept(tokens: list[SessionToken]) -> None:
    """None of the earlier ones is forgotten, since only a primary can tell what was lost of them."""
    latest, *earlier = merged(tokens)
    of_latest = [token for token in tokens if token.epoch == latest.epoch]

    assert latest.timeline == max(token.timeline for token in tokens)
    assert latest.write_floor == max(token.write_floor for token in of_latest)
    assert latest.read_floor == largest(*(token.read_floor for token in of_latest))
    assert sorted(map(str, earlier)) == sorted(str(token) for token in tokens if token not in of_latest)
    assert [token.timeline for token in earlier] == sorted((token.timeline for token in earlier), reverse=True)


@given(tokens=TOKENS_OF_EPOCHS, data=st.data())
@modest
def test_the_order_of_the_tokens_of_a_request_does_not_matter(
    tokens: list[SessionToken], data: st.DataObject
) -> None:
    """A header may be repeated in any order."""
    one, other = merged(tokens), merged(data.draw(st.permutations(tokens)))

    assert [(token.epoch, floors(token)) for token in one[:1]] == [
        (token.epoch, floors(token)) for token in other[:1]
    ]
    assert sorted(map(str, one[1:])) == sorted(map(str, other[1:]))


def test_two_epochs_on_one_timeline_are_left_to_the_primary() -> None:
    """One client cannot have got both from one cluster; it knows one of them at most."""
    tokens = [token_of(1), token_of(2, epoch=OTHER_EPOCH), token_of(3, epoch=LATER)]

    assert merged(tokens[:2]) == tuple(sorted(tokens[:2], key=lambda token: token.epoch, reverse=True))
    assert merged(tokens)[0] == token_of(3, epoch=LATER)


# --- what it can claim ---


@given(token=TOKENS, flush_lsn=KNOWN_LSNS)
@modest
def test_a_token_is_beyond_where_one_of_its_floors_is(token: SessionToken, flush_lsn: Lsn) -> None:
    """An unknown floor claims no position, and the primary's own end is not beyond it."""
    claimed = {token.write_floor} - {Lsn.PENDING}
    if token.read_floor is not None:
        claimed.add(token.read_floor)
    beyond = {floor for floor in claimed if floor > flush_lsn}

    assert (beyond != set()) == token.is_beyond(flush_lsn)


@given(token=TOKENS, flush_lsn=KNOWN_LSNS, later=KNOWN_LSNS)
@modest
def test_what_the_primary_gave_out_is_never_beyond_it(token: SessionToken, flush_lsn: Lsn, later: Lsn) -> None:
    """A session that was served by it is served by it again."""
    if not token.is_beyond(flush_lsn):
        now = Lsn(flush_lsn + later)

        assert not token.after_write(flush_lsn).is_beyond(now)
        assert not token.after_primary_read(flush_lsn).is_beyond(now)


@given(epoch=ANY_EPOCH)
@example(epoch=Epoch("1-0000000000"))
@example(epoch=Epoch("10-9999999999"))
@modest
def test_the_timeline_is_what_stands_before_the_random_part(epoch: Epoch) -> None:
    """Whatever digits follow."""
    timeline, _, _ = epoch.partition("-")

    assert int(timeline) == timeline_of(epoch)
    assert int(timeline) == token_of(0, epoch=epoch).timeline
