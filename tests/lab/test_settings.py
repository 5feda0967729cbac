"""Settings come from where they should, and what is wrong is refused by name."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rocket.errors import InvalidSetting, SetupError
from rocket.lab import settings as run_settings
from rocket.lab.settings import MaxLag, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

modest = settings(max_examples=100)


class Given(NamedTuple):
    """A text that may be given, and the value that it stands for."""

    text: str
    value: object


class Case(NamedTuple):
    """What is agreed about one setting, and texts to try it with: by flag, exported, in the file; and wrong."""

    env: str
    default: object
    good: tuple[Given, Given, Given]
    wrong: tuple[str, ...]


HOSTILE = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "1e999",
    "0x10",
    "\N{ARABIC-INDIC DIGIT THREE}",
    "\N{SUPERSCRIPT TWO}",
    "5\n",
    " ",
    "5 5",
    "5;5",
    "5\t",
    "%s",
    "{0}",
    "None",
    "\x1b[31m",
    "'",
    '"',
    "\\",
    "\u202e5",
    "5" * 500 + "x",
)
"""No number, no time, no word of ours."""

PORT = (Given("6001", 6001), Given("0", 0), Given("65535", 65535))
NO_PORT = ("65536", "99999999999", "5433.0", "http", *HOSTILE)
TIME = (Given("5s", 5.0), Given("20ms", 0.02), Given("1.5", 1.5))
NO_TIME = ("0", "0s", "0.0", "s", "-5s", "5m", "5 d", "5S", "1.2.3", ".", "9" * 400, "5e1", *HOSTILE)
PATHS = (
    Given("one", Path("one")),
    Given("/two words", Path("/two words")),
    Given("~/three", Path.home() / "three"),
)

CASES = {
    "replicas": Case(
        "NUM_REPLICAS", 5, (Given("1", 1), Given("0", 0), Given("30", 30)), ("31", "1.0", "five", "+5", *HOSTILE)
    ),
    "postgres_port": Case("POSTGRES_PORT", 5433, PORT, NO_PORT),
    "data_dir": Case("ROCKET_DATA_DIR", None, PATHS, ()),
    "nodes_file": Case("ROCKET_NODES_FILE", None, PATHS, ()),
    "patroni_ca": Case("ROCKET_PATRONI_CA", None, PATHS, ()),
    "patroni_cert": Case("ROCKET_PATRONI_CERT", None, PATHS, ()),
    "postgres_bin": Case("ROCKET_POSTGRES_BIN", None, PATHS, ()),
    "log_format": Case(
        "ROCKET_LOG_FORMAT",
        "text",
        (Given("json", "json"), Given("text", "text"), Given("json", "json")),
        ("JSON", "xml", "jso", *HOSTILE),
    ),
    "duration": Case("ROCKET_DURATION", None, TIME, NO_TIME),
    "host": Case(
        "ROCKET_HOST", "127.0.0.1", (Given("::1", "::1"), Given("localhost", "localhost"), Given("a.b", "a.b")), ()
    ),
    "api_port": Case("API_PORT", 5005, PORT, NO_PORT),
    "api_workers": Case(
        "ROCKET_API_WORKERS",
        1,
        (Given("2", 2), Given("1", 1), Given("16", 16)),
        ("0", "17", "2.0", "auto", *HOSTILE),
    ),
    "observer_interval": Case("ROCKET_OBSERVER_INTERVAL", 0.5, TIME, NO_TIME),
    "lease": Case("ROCKET_LEASE", 5.0, TIME, NO_TIME),
    "primary_lease": Case("ROCKET_PRIMARY_LEASE", 5.0, TIME, NO_TIME),
    "max_wait": Case(
        "ROCKET_MAX_WAIT",
        0.02,
        (TIME[0], Given("0", 0.0), Given("30ms", 0.03)),
        tuple(text for text in NO_TIME if text != "0"),
    ),
    "max_lag": Case(
        "ROCKET_MAX_LAG",
        MaxLag(16 * 1024 * 1024, 60.0),
        (Given("1KiB", MaxLag(1024, 60.0)), Given("5s", MaxLag(None, 5.0)), Given("7B", MaxLag(7, 60.0))),
        ("-1B", "5TiB", "KiB", "7", "7.5", "1.5MiB", "0s", "5m", *HOSTILE),
    ),
    "routing": Case(
        "ROCKET_ROUTING",
        "never-stale",
        (Given("article", "article"), Given("random", "random"), Given("primary", "primary")),
        ("Primary", "never_stale", "stale", "never-stale ", *HOSTILE),
    ),
    "freshness": Case(
        "ROCKET_FRESHNESS",
        "session",
        (Given("global", "global"), Given("any", "any"), Given("within2.50 s", "within 2.5s")),
        ("Global", "mixed", "within", "within 0s", "within 10", "10s", *HOSTILE),
    ),
    "simulator_rate": Case(
        "ROCKET_SIMULATOR_RATE",
        None,
        (Given("100", 100.0), Given("0.5", 0.5), Given("10000", 10000.0)),
        # float() is generous: white space around a number, and digits of any script, are read.
        ("0", "10000.1", "fast", "1/s", *(text for text in HOSTILE if not text.strip().isdecimal())),
    ),
    "server_logs": Case(
        "ROCKET_SERVER_LOGS",
        False,
        (Given("yes", True), Given("no", False), Given("yes", True)),
        ("true", "1", "YES", "on", *HOSTILE),
    ),
    "no_inspector": Case(
        "ROCKET_NO_INSPECTOR",
        False,
        (Given("yes", True), Given("no", False), Given("yes", True)),
        ("true", "1", "YES", "on", *HOSTILE),
    ),
    "inspector_token": Case(
        "INSPECTOR_TOKEN",
        "",
        (Given("a-b_c.d~", "a-b_c.d~"), Given("1234567890", "1234567890"), Given("x" * 200, "x" * 200)),
        ("short", "x" * 201, "white space", "semi;colon", *HOSTILE),
    ),
    "allowed_hosts": Case(
        "ROCKET_ALLOWED_HOSTS", "", (Given("a.b", "a.b"), Given("c,d", "c,d"), Given("e", "e")), ()
    ),
}

WITH_WRONG_VALUES = [name for name, case in CASES.items() if case.wrong]


def flags(name: str, text: str) -> list[str]:
    """Return what stands on the command line for a setting."""
    if isinstance(CASES[name].default, bool):
        assert text == "yes"
        return [run_settings.flag(name)]
    return [f"{run_settings.flag(name)}={text}"]


def write_dotenv(dotenv_file: Path, values: Mapping[str, str]) -> None:
    """Write a `.env` whose values arrive as they are."""
    lines = []
    for name, value in values.items():
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        lines.append(f"{name}='{escaped}'\n")
    dotenv_file.write_text("".join(lines), encoding="utf-8", newline="")


@pytest.fixture
def dotenv_file(tmp_path: Path) -> Path:
    """Return where a `.env` may be; there is none yet."""
    return tmp_path / ".env"


def load(
    dotenv_file: Path, arguments: list[str], environment: Mapping[str, str], *, cluster_only: bool = False
) -> Settings:
    """Load the settings as a command does."""
    parser = argparse.ArgumentParser()
    run_settings.add_arguments(parser, cluster_only=cluster_only)
    return run_settings.load(parser.parse_args(arguments), environment, dotenv_file)


# --- where settings come from ---


def test_every_setting_has_its_case() -> None:
    """The table above leaves out no setting."""
    secret = {
        "primary",
        "replica",
        "patroni",
        "patroni_dsn",
    }  # see tests/topology/test_patroni_listing.py, tests/attach/test_addresses.py

    assert {each.name for each in fields(Settings)} - {"given"} - secret == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_without_anything_given_the_default_holds(name: str, dotenv_file: Path) -> None:
    """Nothing on the command line, in the environment or in a file: the agreed default."""
    settings = load(dotenv_file, [], {})

    assert CASES[name].default == getattr(settings, name)
    assert frozenset() == settings.given


@pytest.mark.parametrize("name", CASES)
def test_the_file_goes_before_the_default(name: str, dotenv_file: Path) -> None:
    """A line of `.env` is enough."""
    env, _, (_, _, in_file), _ = CASES[name]
    write_dotenv(dotenv_file, {env: in_file.text})
    settings = load(dotenv_file, [], {})

    assert in_file.value == getattr(settings, name)
    assert {name} == settings.given


@pytest.mark.parametrize("name", CASES)
def test_the_environment_goes_before_the_file(name: str, dotenv_file: Path) -> None:
    """What is exported wins over what is kept in `.env`."""
    env, _, (_, exported, in_file), _ = CASES[name]
    write_dotenv(dotenv_file, {env: in_file.text})

    assert exported.value == getattr(load(dotenv_file, [], {env: exported.text}), name)


@pytest.mark.parametrize("name", CASES)
def test_a_flag_goes_before_everything(name: str, dotenv_file: Path) -> None:
    """What is said on the command line wins."""
    env, _, (by_flag, exported, in_file), _ = CASES[name]
    write_dotenv(dotenv_file, {env: in_file.text})

    assert by_flag.value == getattr(load(dotenv_file, flags(name, by_flag.text), {env: exported.text}), name)


def test_settings_do_not_disturb_each_other(dotenv_file: Path) -> None:
    """Each comes from its own best place."""
    write_dotenv(dotenv_file, {"NUM_REPLICAS": "1", "API_PORT": "1", "ROCKET_LEASE": "1"})
    settings = load(dotenv_file, ["--lease", "3"], {"API_PORT": "2", "ROCKET_LEASE": "2"})

    assert (settings.replicas, settings.api_port, settings.lease) == (1, 2, 3.0)
    assert {"replicas", "api_port", "lease"} == settings.given


@pytest.mark.parametrize("name", CASES)
def test_an_empty_variable_is_as_good_as_none(name: str, dotenv_file: Path) -> None:
    """`NUM_REPLICAS= python -m rocket ...` takes a variable away, as does an empty line of `.env`."""
    dotenv_file.write_text(f"{CASES[name].env}=\n")
    settings = load(dotenv_file, [], {CASES[name].env: ""})

    assert CASES[name].default == getattr(settings, name)
    assert frozenset() == settings.given


def test_an_empty_variable_does_not_hide_the_file(dotenv_file: Path) -> None:
    """It is as if it were not there."""
    write_dotenv(dotenv_file, {"NUM_REPLICAS": "2"})

    assert load(dotenv_file, [], {"NUM_REPLICAS": ""}).replicas == 2


def test_the_file_may_be_written_as_people_write_it(dotenv_file: Path) -> None:
    """Comments, `export`, quotes, names alone and names of others are no trouble."""
    dotenv_file.write_text(
        '# ours\n\nexport NUM_REPLICAS=3 # few\nROCKET_HOST="::1"\nAPI_PORT\nSOMEBODY_ELSES=x\n'
    )

    assert Settings(replicas=3, host="::1", given=frozenset({"replicas", "host"})) == load(dotenv_file, [], {})


def test_a_wrong_value_that_is_overridden_does_no_harm(dotenv_file: Path) -> None:
    """Only the value that counts is read."""
    write_dotenv(dotenv_file, {"NUM_REPLICAS": "many"})

    assert load(dotenv_file, ["--replicas=2"], {"NUM_REPLICAS": "several"}).replicas == 2


def test_a_command_about_the_cluster_alone_knows_its_flags_only(dotenv_file: Path) -> None:
    """It reads the rest, if it must, from the environment."""
    assert load(dotenv_file, ["--replicas=2"], {"API_PORT": "7"}, cluster_only=True).api_port == 7
    with pytest.raises(SystemExit):
        load(dotenv_file, ["--api-port=7"], {}, cluster_only=True)


@pytest.mark.parametrize(
    ("arguments", "port"), [([], None), (["--postgres-port=6"], 6), (["--postgres-port=0"], None)]
)
def test_a_cluster_is_looked_for_by_port_only_if_one_was_named(
    arguments: list[str], port: int | None, dotenv_file: Path
) -> None:
    """The default port is no name, and neither is "any free one"."""
    assert port == load(dotenv_file, arguments, {}).port_asked_for


def test_the_help_names_every_flag_variable_and_default() -> None:
    """What `--help` shows as a default is read as that default."""
    parser = argparse.ArgumentParser()
    run_settings.add_arguments(parser)
    shown = " ".join(parser.format_help().split())
    for name, case in CASES.items():
        assert run_settings.flag(name) in shown
        assert re.search(rf"\[{case.env}(=yes)?\]", shown)
        if case.default not in {None, "", False}:
            match = re.search(rf"\(default: (\S+)\) \[{case.env}\]", shown)
            assert match
            arguments = parser.parse_args(flags(name, match[1]))
            assert case.default == getattr(run_settings.load(arguments, {}, Path("no such file")), name)


def test_the_help_shows_each_setting_once_with_others_of_its_kind() -> None:
    """In one of its groups, and times as people write them."""
    grouped = [name for names in run_settings.GROUPS.values() for name in names]
    parser = argparse.ArgumentParser()
    run_settings.add_arguments(parser)

    assert sorted(grouped) == sorted({each.name for each in fields(Settings)} - {"given"})
    assert {"20ms", "0.5s", "5s", "16MiB"} <= set(re.findall(r"\(default:\s+(\S+)\)", parser.format_help()))


# --- what is wrong ---


@pytest.mark.parametrize("name", [name for name in WITH_WRONG_VALUES if not isinstance(CASES[name].default, bool)])
def test_a_wrong_flag_is_refused_by_name(name: str, dotenv_file: Path) -> None:
    """The error begins with the flag, says what would be right, and shows what was given, on one line."""
    for text in CASES[name].wrong:
        with pytest.raises(InvalidSetting) as caught:
            load(dotenv_file, flags(name, text), {})
        assert_refusal(str(caught.value), run_settings.flag(name), text)


@pytest.mark.parametrize("name", WITH_WRONG_VALUES)
def test_a_wrong_variable_is_refused_by_name(name: str, dotenv_file: Path) -> None:
    """The error begins with the variable's name."""
    for text in CASES[name].wrong:
        with pytest.raises(InvalidSetting) as caught:
            load(dotenv_file, [], {CASES[name].env: text})
        assert_refusal(str(caught.value), CASES[name].env, text)


@pytest.mark.parametrize("name", WITH_WRONG_VALUES)
def test_a_wrong_line_of_the_file_is_refused_by_name(name: str, dotenv_file: Path) -> None:
    """The error begins with the variable's name and says in which file it stands."""
    for text in CASES[name].wrong:
        write_dotenv(dotenv_file, {CASES[name].env: text})
        with pytest.raises(InvalidSetting) as caught:
            load(dotenv_file, [], {})
        assert_refusal(str(caught.value), f"{CASES[name].env} in {dotenv_file}", text)


def assert_refusal(message: str, origin: str, text: str) -> None:
    """Assert that a refusal names the origin and the value, and is one line that a terminal can show."""
    assert message.startswith(f"{origin} must ")
    assert message.endswith(f", not {text!r}")
    assert message.isprintable()


@pytest.mark.parametrize(
    "name", [name for name in CASES if CASES[name].wrong and not isinstance(CASES[name].default, bool)]
)
def test_an_empty_flag_is_refused(name: str, dotenv_file: Path) -> None:
    """`--host ""` is a slip of a script, not a wish for the default."""
    with pytest.raises(InvalidSetting) as caught:
        load(dotenv_file, flags(name, ""), {})

    assert_refusal(str(caught.value), run_settings.flag(name), "")


def test_a_file_that_is_no_text_is_refused_by_name(dotenv_file: Path) -> None:
    """The error names the file, since no line of it can be named."""
    dotenv_file.write_bytes(b"NUM_REPLICAS=\xff\n")
    with pytest.raises(InvalidSetting, match=re.escape(f"cannot read {dotenv_file}")):
        load(dotenv_file, [], {})


def test_a_wrong_setting_ends_a_command_as_wrong_use() -> None:
    """It is one of the errors that end with one line and exit code 2."""
    assert issubclass(InvalidSetting, SetupError)


# --- the parsers, one by one ---


FACTORS = {"": 1.0, "s": 1.0, "ms": 0.001, "min": 60.0, "h": 3600.0}


@given(
    number=st.decimals(min_value="0.001", max_value=10**6, places=3),
    unit=st.sampled_from(sorted(FACTORS)),
    gap=st.sampled_from(["", " ", "   "]),
)
@modest
def test_a_duration_is_its_number_times_its_unit(number: Any, unit: str, gap: str) -> None:
    """`20ms`, `0.5`, `2 min`: whatever the number and the unit, seconds come out."""
    assert math.isclose(float(number) * FACTORS[unit], run_settings.parse_duration(f"{number}{gap}{unit}"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("0.5", 0.5), (".5", 0.5), ("5.", 5.0), ("20ms", 0.02), ("5s", 5.0), ("2min", 120.0)]
)
def test_durations_as_people_write_them(text: str, seconds: float) -> None:
    """The forms that the help shows, and those with a bare point."""
    assert math.isclose(seconds, run_settings.parse_duration(text))


@given(text=st.text(max_size=12) | st.text("0123456789.smhin eE+-", max_size=12))
@modest
def test_a_duration_is_above_zero_and_finite_or_refused(text: str) -> None:
    """No text becomes a time that a clock cannot wait for."""
    try:
        seconds = run_settings.parse_duration(text)
    except ValueError:
        return

    assert 0 < seconds < math.inf


SIZES = {
    "B": 1,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
}


@given(
    number=st.integers(0, 10**15),
    unit=st.sampled_from(sorted(SIZES)),
    spelling=st.sampled_from([str, str.upper, str.lower]),
    gap=st.sampled_from(["", " "]),
)
@modest
def test_a_size_is_its_number_times_its_unit(
    number: int, unit: str, spelling: Callable[[str], str], gap: str
) -> None:
    """Exactly so, in any spelling, with units of ten and of two kept apart; and a minute is a bound, too."""
    assert MaxLag(number * SIZES[unit], 60.0) == run_settings.parse_max_lag(f"{number}{gap}{spelling(unit)}")


@given(number=st.integers(1, 10**6), unit=st.sampled_from(["s", "ms", "min", "h"]))
@modest
def test_a_bound_with_a_unit_of_time_is_in_seconds(number: int, unit: str) -> None:
    """It means the same as any other time."""
    text = f"{number}{unit}"

    assert MaxLag(None, run_settings.parse_duration(text)) == run_settings.parse_max_lag(text)


@given(text=st.text(max_size=12) | st.text("0123456789.smhinkKMGBib ", max_size=12))
@modest
def test_a_bound_is_in_bytes_or_seconds_or_refused(text: str) -> None:
    """Never negative, and never unbounded in time: a replica that is cut off meets that alone."""
    try:
        bound = run_settings.parse_max_lag(text)
    except ValueError:
        return

    assert bound.seconds is not None
    assert (bound.bytes or 0) >= 0
    assert (bound.seconds or 0.0) >= 0.0


@given(number=st.integers(-10, 10**7), least=st.integers(0, 100), width=st.integers(0, 10**5))
@modest
def test_a_whole_number_is_within_its_bounds_or_refused(number: int, least: int, width: int) -> None:
    """Both bounds are allowed values."""
    most = least + width
    if least <= number <= most:
        assert number == run_settings.parse_whole(str(number), least, most)
    else:
        with pytest.raises(ValueError, match=f"from {least} to {most}"):
            run_settings.parse_whole(str(number), least, most)


@given(
    text=st.text(max_size=20) | st.text("0123456789.eE+-_ naif", max_size=20),
    parse=st.sampled_from(
        [
            run_settings.parse_port,
            run_settings.parse_replica_count,
            run_settings.parse_worker_count,
            run_settings.parse_duration,
            run_settings.parse_rate,
            run_settings.parse_max_lag,
            run_settings.parse_freshness,
            run_settings.parse_yes_or_no,
            run_settings.parse_text,
        ]
    ),
)
@modest
def test_a_parser_reads_or_says_what_would_be_right(text: str, parse: Callable[[str], object]) -> None:
    """Whatever it is given, nothing but a `ValueError` comes out, whose words go behind the setting's name."""
    try:
        parse(text)
    except ValueError as error:
        assert str(error).startswith("must ")  # noqa: PT017 - most texts are refused, some are read


@given(
    text=st.text(max_size=20) | st.text("0123456789.smhinkKMGBib~-, ", max_size=20),
    setting=st.sampled_from([each for each in fields(Settings) if each.metadata]),
)
@modest
def test_any_text_is_a_value_of_a_setting_or_refused_on_one_line(text: str, setting: Any) -> None:
    """Of every setting there is, also of those to come: nothing but a `ValueError` in one line comes out."""
    try:
        value = setting.metadata["read"](text)
    except ValueError as error:
        assert str(error).isprintable()  # noqa: PT017 - most texts are refused, some are read
    else:
        assert not isinstance(value, float) or 0 <= value < math.inf


@given(rate=st.floats(1e-6, 10_000))
@example(0.00014296102946003425)  # 20 decimals
@modest
def test_a_rate_is_read_as_it_is(rate: float) -> None:
    """Any number of rides a second up to the most."""
    assert rate == run_settings.parse_rate(repr(rate))


@pytest.mark.parametrize("text", ["one of", "", "red,green", "RED", "red "])
def test_a_word_is_one_of_those_that_are_known(text: str) -> None:
    """Exactly so spelled; the error says which there are."""
    read = run_settings.parse_one_of("red", "green")

    assert [read("red"), read("green")] == ["red", "green"]
    with pytest.raises(ValueError, match="must be one of red, green"):
        read(text)


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`.env` is read by no shell that would do it."""
    monkeypatch.setenv("HOME", str(tmp_path))

    assert tmp_path / "cluster" == run_settings.parse_path("~/cluster")


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_colours_can_be_declined(environment: dict[str, str], *, wanted: bool) -> None:
    """As other programs let one."""
    assert wanted == run_settings.colours_wanted(environment)
