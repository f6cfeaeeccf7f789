"""The option table and what is decided over it: reading, locking, building, comparing."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.core import options
from vmferry.core.migration_status import MigrationStatus as S
from vmferry.core.options import (
    CAPABILITIES,
    ENDING,
    OPEN,
    OPTIONS,
    PARAMETERS,
    UNSET,
    AttemptOptions,
    Config,
    Kind,
    Mode,
    Option,
    Policy,
    Refused,
    Role,
    TlsChoice,
    Value,
    ValueType,
    Window,
    build,
    check_value,
    differences,
    docs_markdown,
    find_option,
    format_value,
    help_lines,
    parse_setting,
    policy_objection,
    refusal,
    with_switchover_ack,
)
from vmferry.errors import UsageError

NEW = frozenset(name for name, o in OPTIONS.items() if o.gone_in is None)
OLD = frozenset(name for name, o in OPTIONS.items() if o.since <= (7, 2))
every_option = pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda o: o.name)
EVERY_PAIR = [(option, role) for option in OPTIONS.values() for role in Role]


def ask(option: Option, status: S, role: Role, *, cleanup_done: bool = False, has_attempt: bool = True) -> str | None:
    return refusal(option, status, role=role, cleanup_done=cleanup_done, attempt=3, has_attempt=has_attempt)


def made(mode: Mode = Mode.PRECOPY, settings: dict[str, Value] | None = None, **more: Any) -> AttemptOptions:
    known: dict[str, Any] = {"source_known": NEW, "destination_known": NEW}
    result = build(mode, settings or {}, **(known | more))
    assert isinstance(result, AttemptOptions), result
    return result


def refused(mode: Mode = Mode.PRECOPY, settings: dict[str, Value] | None = None, **more: Any) -> tuple[str, ...]:
    known: dict[str, Any] = {"source_known": NEW, "destination_known": NEW}
    result = build(mode, settings or {}, **(known | more))
    assert isinstance(result, Refused), result
    return result.objections


# --- the table


def test_the_counts_of_qemu_11_1() -> None:
    assert len([o for o in CAPABILITIES if o.gone_in is None]) == 21
    assert len([o for o in PARAMETERS if o.gone_in is None]) == 31


@every_option
def test_each_row_is_whole(option: Option) -> None:
    assert option.first_use
    assert option.what
    assert option.roles
    assert option.allowed()
    assert (option.kind is Kind.CAPABILITY) <= (option.type is ValueType.BOOL)
    assert bool(option.words) == (option.type is ValueType.ENUM)
    numbers = {ValueType.INT, ValueType.PERCENT, ValueType.SIZE, ValueType.RATE, ValueType.RATE_MB, ValueType.TIME}
    assert (option.low is not None) == (option.high is not None) == (option.type in numbers)
    if option.gone_in is not None:
        assert option.since < option.gone_in
        assert option.policy is Policy.FORBIDDEN


@every_option
def test_a_default_is_a_value_that_the_option_takes(option: Option) -> None:
    for value in (option.default, option.qemu_default):
        if value is UNSET:
            continue
        if option.low is not None and option.high is not None:
            assert isinstance(value, int)
            assert option.low <= value <= option.high
        if option.words:
            assert value in option.words


@pytest.mark.proves("S72", "S76")
def test_the_allow_list_has_nine_one_and_three_entries_each_with_a_reason() -> None:
    def opened(status: S) -> set[str]:
        return {n for n, o in OPTIONS.items() if ask(o, status, Role.SOURCE) is None}

    assert len(opened(S.ACTIVE)) == 9
    assert opened(S.POSTCOPY_ACTIVE) == {"max-postcopy-bandwidth"}
    assert opened(S.POSTCOPY_PAUSED) == {"tls-creds", "tls-hostname", "tls-authz"}
    everything = opened(S.ACTIVE) | opened(S.POSTCOPY_ACTIVE) | opened(S.POSTCOPY_PAUSED)
    assert everything == {n for n, o in OPTIONS.items() if o.safe_because}


@pytest.mark.proves("S73", "S75", "S78")
def test_the_table_is_in_the_document() -> None:
    text = docs_markdown()
    for option in OPTIONS.values():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{option.name}` |"))
        assert str(option.window) in row
        assert option.first_use in row
    assert "7.1 on" in text
    assert "to before 9.1" in text


def test_the_help_lists_what_a_person_may_set() -> None:
    names = {line.split()[0] for line in help_lines()}
    assert names == {name for name, o in OPTIONS.items() if o.policy is Policy.FREE}


# --- windows


EXPECTED_OPEN = {
    Window.LOCKED: set[S](),
    Window.ACTIVE: {S.ACTIVE},
    Window.ACTIVE_AND_POSTCOPY: {S.ACTIVE, S.POSTCOPY_ACTIVE},
    Window.POSTCOPY_PAUSED: {S.POSTCOPY_PAUSED},
}


@pytest.mark.proves("S68", "S74", "S77")
@pytest.mark.parametrize("status", S)
def test_an_attempt_locks_all_but_the_open_windows(status: S) -> None:
    for option, role in EVERY_PAIR:
        expected = status in EXPECTED_OPEN[option.window] and role in option.roles
        said = ask(option, status, role)
        assert (said is None) == expected, (option.name, role)
        if said is not None:
            assert option.name in said or "no option may change" in said
        if status in ENDING:
            assert said is not None
            assert "attempt 3 is cleaning up" in said


@pytest.mark.parametrize("status", S)
def test_without_an_attempt_only_qemus_own_work_locks(status: S) -> None:
    idle = status in {S.NONE, S.COMPLETED, S.FAILED, S.CANCELLED}
    for option, role in EVERY_PAIR:
        said = ask(option, status, role, has_attempt=False)
        assert (said is None) == idle, (option.name, role)
        if said is not None:
            assert "vmferry did not start" in said


@pytest.mark.parametrize("status", [S.NONE, S.COMPLETED, S.FAILED, S.CANCELLED])
def test_after_the_cleanup_everything_is_free(status: S) -> None:
    assert all(ask(option, status, role, cleanup_done=True) is None for option, role in EVERY_PAIR)


@pytest.mark.parametrize("status", [S.COMPLETED, S.FAILED, S.CANCELLED])
def test_before_the_cleanup_nothing_is(status: S) -> None:
    for option in OPTIONS.values():
        assert "attempt 3 is cleaning up" in (ask(option, status, Role.SOURCE) or "")


@pytest.mark.proves("S80")
def test_a_status_invented_tomorrow_opens_nothing() -> None:
    class Tomorrow(StrEnum):
        ENTANGLED = "entangled"

    status = cast(S, Tomorrow.ENTANGLED)
    for option, role in EVERY_PAIR:
        assert ask(option, status, role, cleanup_done=False) is not None
        assert ask(option, status, role, cleanup_done=True) is not None
        assert ask(option, status, role, has_attempt=False) is not None
    assert all(status not in statuses for statuses in OPEN.values())


@pytest.mark.proves("S80")
def test_windows_are_explicit_sets_of_todays_statuses() -> None:
    assert {window: set(statuses) for window, statuses in OPEN.items()} == EXPECTED_OPEN


@pytest.mark.parametrize("known", [OLD, NEW], ids=["old", "new"])
def test_what_may_change_on_the_way_is_among_what_an_attempt_sets(known: frozenset[str]) -> None:
    """So what was remembered before an attempt covers every change that a person makes while it runs."""
    changing = {o.name for o in OPTIONS.values() if ask(o, S.ACTIVE, Role.SOURCE) is None}
    options_set = made(source_known=known, destination_known=known)
    assert changing
    assert changing & known <= {*options_set.source_capabilities, *options_set.source_parameters}


@pytest.mark.parametrize(
    ("name", "status", "role", "words"),
    [
        ("multifd-channels", S.ACTIVE, Role.SOURCE, "in use since the channels were opened"),
        ("multifd-channels", S.SETUP, Role.DESTINATION, "fixed on the destination since attempt 3 was prepared"),
        ("max-bandwidth", S.DEVICE, Role.SOURCE, "may change only while active; now the migration is in device"),
        ("max-bandwidth", S.ACTIVE, Role.DESTINATION, "fixed on the destination"),
        ("max-bandwidth", S.NONE, Role.SOURCE, "fixed on the source since attempt 3 was prepared"),
        ("max-bandwidth", S.FAILING, Role.SOURCE, "attempt 3 is cleaning up (failing)"),
        ("tls-creds", S.ACTIVE, Role.DESTINATION, "only while postcopy is paused"),
    ],
)
def test_a_refusal_names_its_window(name: str, status: S, role: Role, words: str) -> None:
    assert words in (ask(OPTIONS[name], status, role) or "")


@pytest.mark.proves("S75")
@every_option
def test_while_disks_are_copied_before_it_what_changes_with_the_memory_is_not_in_use(option: Option) -> None:
    """For hours, maybe; the public status is `setup` for so long."""
    for role in Role:
        wish = {"role": role, "cleanup_done": False, "attempt": 3, "has_attempt": True}
        now = refusal(option, S.SETUP, waits_for_disks=True, **wish)  # type: ignore[arg-type]
        with_memory = refusal(option, S.ACTIVE, **wish)  # type: ignore[arg-type]
        assert (now is None) == (with_memory is None), (option.name, role, now)


# --- reading


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("downtime-limit=200ms", 200), ("downtime-limit=1.5s", 1500), ("downtime-limit=70", 70),
        ("max-bandwidth=2G", 2 << 30), ("max-bandwidth = 100M/s", 100 << 20), ("max-bandwidth=1GiB/s", 1 << 30),
        ("xbzrle-cache-size=64M", 64 << 20), ("auto-converge=on", True), ("auto-converge=NO", False),
        ("max-cpu-throttle=80%", 80), ("announce-rounds=7", 7), ("multifd-compression=zstd", "zstd"),
        ("tls-creds=tls0", "tls0"), ("tls-creds=", ""), ("vcpu-dirty-limit=20", 20),
    ],
)  # fmt: skip
def test_settings_are_read_in_qemus_units(text: str, value: Value) -> None:
    option, read = parse_setting(text)
    assert (read, type(read)) == (value, type(value))
    assert option is OPTIONS[text.partition("=")[0].strip()]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("downtime-limit", "write NAME=VALUE"),
        ("downtime_limt=3", "did you mean downtime-limit?"),
        ("qqq=3", "there is no migration option 'qqq'"),
        ("downtime-limit=2h", "allowed: 0 to 2000000 (time in ms)"),
        ("downtime-limit=soon", "is not a time"),
        ("max-cpu-throttle=0", "allowed: 1 to 99 (percent)"),
        ("max-cpu-throttle=-1", "whole number"),
        ("max-cpu-throttle=²", "whole number"),
        ("announce-rounds=7%", "whole number"),
        ("auto-converge=maybe", "write on or off"),
        ("max-bandwidth=10Gbit/s", "in bytes per second here"),
        ("max-bandwidth=10Gbps", "in bytes per second here"),
        ("max-bandwidth=much", "is not a size"),
        ("multifd-compression=lzma", "one of none, zlib, zstd"),
        ("xbzrle-cache-size=65000", "not a power of two"),
        ("block-bitmap-mapping=x", "is a list"),
    ],
)
def test_a_bad_setting_is_explained(text: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_setting(text)
    assert words in raised.value.message
    assert "\n" not in raised.value.message


def test_a_malformed_value_says_in_its_hint_what_is_allowed() -> None:
    with pytest.raises(UsageError) as raised:
        parse_setting("auto-converge=maybe")
    assert raised.value.hint == "allowed: on or off"


@given(st.sampled_from([o for o in PARAMETERS if o.low is not None]), st.integers(0, 1 << 64))
def test_a_number_is_read_exactly_or_refused(option: Option, number: int) -> None:
    assert option.low is not None
    assert option.high is not None
    possible = option.low <= number <= option.high
    try:
        _, value = parse_setting(f"{option.name}={number}")
    except UsageError:
        assert not possible or option.power_of_two or number > 1 << 52
    else:
        assert possible or number > 1 << 52
        assert value == number or number > 1 << 52


@given(st.text(max_size=40))
def test_any_text_is_a_setting_or_a_usage_error(text: str) -> None:
    try:
        option, _ = parse_setting(text)
    except UsageError:
        return
    assert option.name in OPTIONS


@given(st.sampled_from(sorted(OPTIONS)), st.text(max_size=20))
def test_any_value_is_read_or_a_usage_error(name: str, text: str) -> None:
    try:
        option, value = parse_setting(f"{name}={text}")
    except UsageError:
        return
    assert isinstance(value, bool | int | str)
    assert format_value(option, value)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("events", True, "on"), ("events", False, "off"), ("downtime-limit", 300, "300 ms"),
        ("max-bandwidth", 1 << 30, "1.0 GiB/s"), ("xbzrle-cache-size", 64 << 20, "64.0 MiB"),
        ("max-cpu-throttle", 9, "9 %"), ("tls-creds", "", "(empty)"), ("mode", "normal", "normal"),
    ],
)  # fmt: skip
def test_values_are_shown_with_their_unit(name: str, value: Value, shown: str) -> None:
    assert format_value(find_option(name), value) == shown


# --- policy and building


def test_what_is_forced_or_forbidden_may_be_repeated_but_not_turned() -> None:
    assert policy_objection(OPTIONS["events"], True) is None
    assert "stays on" in (policy_objection(OPTIONS["events"], False) or "")
    assert policy_objection(OPTIONS["release-ram"], False) is None
    assert "rollback" in (policy_objection(OPTIONS["release-ram"], True) or "")
    assert policy_objection(OPTIONS["x-checkpoint-delay"], True) is not None
    assert policy_objection(OPTIONS["auto-converge"], True) is None
    assert "--mode" in (policy_objection(OPTIONS["postcopy-ram"], False) or "")


@pytest.mark.proves("S109", "S129")
@pytest.mark.parametrize(
    ("name", "value"), [("x-colo", True), ("mode", "cpr-reboot"), ("mode", "cpr-exec"), ("mode", "cpr-transfer")]
)
def test_colo_and_cpr_are_refused_with_a_reason(name: str, value: Value) -> None:
    (objection,) = refused(settings={name: value})
    assert name in objection
    assert "not supported" in objection


def test_the_enforced_set() -> None:
    both = made()
    assert both.source_capabilities["events"] is True
    assert both.source_capabilities["return-path"] is True
    assert both.source_capabilities["pause-before-switchover"] is True
    assert both.source_capabilities["late-block-activate"] is False
    assert both.destination_capabilities["events"] is True
    assert both.destination_capabilities["return-path"] is True
    assert both.destination_capabilities["late-block-activate"] is True
    assert both.destination_capabilities["pause-before-switchover"] is False
    off = {"release-ram", "x-colo", "background-snapshot", "x-ignore-shared", "mapped-ram", "postcopy-ram", "multifd"}
    for role in Role:
        assert not any(both.capabilities(role)[name] for name in off)
        assert both.parameters(role)["mode"] == "normal"
        assert both.parameters(role)["tls-creds"] == ""


@pytest.mark.parametrize("known", [NEW, OLD, NEW | {"brand-new"}])
def test_every_known_option_is_set_or_named_as_skipped(known: frozenset[str]) -> None:
    both = made(source_known=known, destination_known=known)
    for role in Role:
        named = {*both.capabilities(role), *both.parameters(role)}
        skipped = {s.name for s in both.skipped if s.role is role}
        assert named | skipped == known
        assert not named & skipped
        assert "brand-new" not in named
        assert both.expected(role)["tls-authz"] == ""


def test_choices_reach_the_sides_they_belong_to() -> None:
    both = made(
        Mode.POSTCOPY,
        {"auto-converge": True, "downtime-limit": 50, "announce-rounds": 9, "multifd-compression": "zlib"},
        multifd_channels=4,
        tls=TlsChoice("tls-s", "tls-d", hostname="host-b", authz="authz0"),
    )
    source, destination = both.expected(Role.SOURCE), both.expected(Role.DESTINATION)
    assert (source["auto-converge"], destination["auto-converge"]) == (True, False)
    assert (source["downtime-limit"], destination["downtime-limit"]) == (50, 300)
    assert (source["announce-rounds"], destination["announce-rounds"]) == (5, 9)
    for side in (source, destination):
        assert side["postcopy-ram"] is True
        assert side["multifd"] is True
        assert side["multifd-channels"] == 4
        assert side["multifd-compression"] == "zlib"
    assert (source["tls-creds"], destination["tls-creds"]) == ("tls-s", "tls-d")
    assert (source["tls-hostname"], destination["tls-hostname"]) == ("host-b", "")
    assert (source["tls-authz"], destination["tls-authz"]) == ("", "authz0")
    assert "tls-authz" not in both.source_parameters


def test_tls_without_authorisation_leaves_tls_authz_alone() -> None:
    both = made(tls=TlsChoice("tls-s", "tls-d"))
    assert "tls-authz" not in both.destination_parameters
    assert both.destination_parameters["tls-creds"] == "tls-d"


def test_an_empty_configuration_says_precopy() -> None:
    assert Config(Mode.PRECOPY).chosen(Role.SOURCE)["postcopy-ram"] is False


def test_all_objections_come_at_once() -> None:
    objections = refused(
        settings={"x-colo": True, "events": False, "compress": False, "avail-switchover-bandwidth": 5},
        source_known=NEW,
        destination_known=OLD - {"return-path"},
        multifd_channels=300,
    )
    text = "\n".join(objections)
    for words in (
        "300 multifd channels are not possible; allowed: 0 to 255",
        "x-colo is refused",
        "events stays on",
        "the source's QEMU does not know compress",
        "the destination's QEMU does not know return-path",
    ):
        assert words in text
    assert "destination's QEMU does not know avail-switchover-bandwidth" not in text


@pytest.mark.proves("S90")
def test_a_passed_through_device_is_asked_before_the_switchover_where_both_qemus_can() -> None:
    able, unable = frozenset({"switchover-ack"}), frozenset({"multifd"})
    on = {"xbzrle": True, "switchover-ack": True}
    assert with_switchover_ack({"xbzrle": True}, has_vfio=True, known=[able, able]) == on
    for vfio, known in ((False, [able, able]), (None, [able, able]), (True, [able, unable])):
        assert with_switchover_ack({"xbzrle": True}, has_vfio=vfio, known=known) == {"xbzrle": True}
    chosen = {"switchover-ack": False}
    assert with_switchover_ack(chosen, has_vfio=True, known=[able, able]) == chosen


def test_a_name_outside_the_table_is_refused() -> None:
    assert refused(settings={"warp": 9}) == ("there is no migration option 'warp'",)


def test_a_choice_that_one_side_lacks_is_refused() -> None:
    (objection,) = refused(settings={"switchover-ack": True}, source_known=NEW, destination_known=OLD)
    assert objection == "the destination's QEMU does not know switchover-ack"


@pytest.mark.parametrize(
    ("mode", "settings", "channels", "words"),
    [
        (Mode.PRECOPY, {"postcopy-preempt": True}, 0, "only with --mode postcopy"),
        (Mode.PRECOPY, {"multifd-compression": "zstd"}, 0, "only with --multifd"),
        (Mode.PRECOPY, {"zero-copy-send": True}, 0, "only with --multifd"),
        (Mode.PRECOPY, {"zero-copy-send": True, "multifd-compression": "zstd"}, 2, "cannot compress"),
        (Mode.PRECOPY, {"xbzrle": True}, 2, "multifd cannot send differences"),
        (Mode.PRECOPY, {"dirty-limit": True, "auto-converge": True}, 0, "exclude each other"),
        (Mode.PRECOPY, {"max-cpu-throttle": 10}, 0, "less than cpu-throttle-initial"),
    ],
)
def test_what_excludes_each_other_is_refused(mode: Mode, settings: dict[str, Value], channels: int, words: str) -> None:
    (objection,) = refused(mode, settings, multifd_channels=channels)
    assert words in objection


def test_zero_copy_cannot_encrypt() -> None:
    (objection,) = refused(settings={"zero-copy-send": True}, multifd_channels=2, tls=TlsChoice("a", "b"))
    assert "cannot encrypt" in objection


def test_commands_switch_zero_copy_on_last() -> None:
    plain = made().commands(Role.SOURCE)
    assert [name for name, _ in plain] == ["migrate-set-capabilities", "migrate-set-parameters"]
    both = made(settings={"zero-copy-send": True}, multifd_channels=2)
    first, _, last = both.commands(Role.SOURCE)
    assert {"capability": "zero-copy-send", "state": False} in first[1]["capabilities"]
    assert last == (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "zero-copy-send", "state": True}]},
    )
    assert len(both.commands(Role.DESTINATION)) == 2


settings_of_free = st.dictionaries(
    st.sampled_from(sorted(n for n, o in OPTIONS.items() if o.policy is Policy.FREE and o.type is ValueType.BOOL)),
    st.booleans(),
)


@given(st.sampled_from(Mode), settings_of_free, st.integers(0, 4), st.sets(st.sampled_from(sorted(OPTIONS))))
def test_build_sets_exactly_what_is_known_or_refuses(
    mode: Mode, settings: dict[str, bool], channels: int, lacking: set[str]
) -> None:
    known = frozenset(OPTIONS) - lacking
    result = build(mode, dict(settings), source_known=known, destination_known=known, multifd_channels=channels)
    if isinstance(result, Refused):
        assert result.objections
        return
    for role in Role:
        sent = {*result.capabilities(role), *result.parameters(role)}
        assert sent <= known
        assert {"events", "return-path"} <= sent
        assert not differences(result.expected(role), result.expected(role))
        for name, value in settings.items():
            if role in OPTIONS[name].roles:
                assert result.capabilities(role).get(name, result.parameters(role).get(name)) == value


def test_differences_find_every_value_that_did_not_stick() -> None:
    wanted = {"multifd": True, "multifd-channels": 4, "multifd-zstd-level": 3, "cpu-throttle-tailslow": False}
    assert differences(wanted, dict(wanted)) == ()
    found = differences(wanted, {"multifd": 1, "multifd-channels": 4, "multifd-zstd-level": 1})
    assert found == (
        "multifd: wanted True, QEMU says 1",
        "multifd-zstd-level: wanted 3, QEMU says 1",
        "cpu-throttle-tailslow: wanted False, QEMU does not report it",
    )


def test_the_public_names_exist() -> None:
    assert all(hasattr(options, name) for name in options.__all__)


@pytest.mark.proves("S82")
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("downtime-limit", 300), ("auto-converge", True), ("multifd-compression", "zlib"), ("tls-creds", "tls0"),
        ("block-bitmap-mapping", []), ("xbzrle-cache-size", 1 << 20), ("multifd-zlib-level", 9),
    ],
)  # fmt: skip
def test_a_typed_value_is_taken_as_it_is(name: str, given: Value) -> None:
    assert check_value(find_option(name), given) == given


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("downtime-limit", "300"), ("downtime-limit", True), ("downtime-limit", -1), ("downtime-limit", None),
        ("auto-converge", 1), ("multifd-compression", "gzip"), ("multifd-compression", 1), ("tls-creds", 7),
        ("block-bitmap-mapping", {}), ("xbzrle-cache-size", 5000), ("downtime-limit", 1.5),
    ],
)  # fmt: skip
def test_a_value_of_another_type_or_out_of_range_is_refused_with_what_is_allowed(name: str, given: Any) -> None:
    with pytest.raises(UsageError, match=name):
        check_value(find_option(name), given)
