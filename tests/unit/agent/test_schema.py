"""`query-qmp-schema`: every command and event is in it, and what it says is what the decoder takes and clients hear."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from qemu.qmp import QMPClient

from vmferry.agent.control import COMMANDS, decode, schema_wire
from vmferry.agent.events import EVENTS
from vmferry.agent.job_book import JobInfo
from vmferry.agent.schema import Schema
from vmferry.errors import UsageError
from vmferry.testing.fake_site import MakeSite

ENTITIES = {entity["name"]: entity for entity in schema_wire()}
VALUES: dict[str, Any] = {"string": "x", "int": 1, "number": 1.5, "boolean": True, "value": {}}
each_command = pytest.mark.parametrize("name", COMMANDS)


def value_of(kind: str) -> Any:
    entity = ENTITIES[kind]
    match entity["meta-type"]:
        case "builtin":
            return VALUES[entity["json-type"]]
        case "enum":
            return entity["values"][0]
        case "array":
            return [value_of(entity["element-type"])]
        case _:
            return {member["name"]: value_of(member["type"]) for member in entity["members"]}


def members_of(command: str) -> list[dict[str, Any]]:
    return list(ENTITIES[ENTITIES[command]["arg-type"]]["members"])


def test_the_list_is_closed_and_each_entity_has_qemus_form() -> None:
    needed = {
        "command": {"arg-type", "ret-type"}, "event": {"arg-type"}, "array": {"element-type"}, "builtin": {"json-type"},
        "enum": {"members", "values"}, "object": {"members"},
    }  # fmt: skip
    assert len(ENTITIES) == len(schema_wire())
    for entity in ENTITIES.values():
        for key in needed[entity["meta-type"]]:
            assert key in entity
            if key.endswith("-type") and key != "json-type":
                assert entity[key] in ENTITIES
        for member in entity.get("members", ()):
            assert entity["meta-type"] == "enum" or member["type"] in ENTITIES
            assert member.get("default") is None


def test_every_command_and_event_of_the_server_is_in_it_and_nothing_else() -> None:
    by_kind = {
        kind: {name for name, one in ENTITIES.items() if one["meta-type"] == kind} for kind in ("command", "event")
    }
    assert by_kind["command"] == {*COMMANDS, "qmp_capabilities"}
    assert by_kind["event"] == set(EVENTS)


@each_command
def test_what_the_schema_says_is_what_the_decoder_takes(name: str) -> None:
    kind = COMMANDS[name].arguments
    members = members_of(name)
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(kind)}
    assert {member["name"] for member in members} == fields
    required = {member["name"]: value_of(member["type"]) for member in members if "default" not in member}
    decode(name, kind, required)
    decode(name, kind, {member["name"]: value_of(member["type"]) for member in members})
    for member in members:
        decode(name, kind, {**required, member["name"]: value_of(member["type"])})
    for missing in required:
        with pytest.raises(UsageError, match=missing.replace("-", ".")):
            decode(name, kind, {key: value for key, value in required.items() if key != missing})
    with pytest.raises(UsageError, match="no argument"):
        decode(name, kind, {**required, "no-such-thing": 1})


def test_query_jobs_tells_the_type_of_its_answer() -> None:
    element = ENTITIES[ENTITIES["query-jobs"]["ret-type"]]["element-type"]
    names = {member["name"] for member in ENTITIES[element]["members"]}
    assert {"id", "type", "status", "current-progress", "total-progress", "error"} <= names
    assert len(names) == len(dataclasses.fields(JobInfo))


def _decoded(kind: type, data: dict[str, Any]) -> None:
    assert set(data) <= {field.name for field in dataclasses.fields(kind)}, (kind, data)
    msgspec.convert(data, kind)


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
async def test_every_event_that_is_sent_is_as_the_schema_says(make_site: MakeSite, mode: str) -> None:
    site = await make_site()
    heard: list[tuple[str, dict[str, Any]]] = []
    for agent in site.agents.values():
        broadcast = agent.control_server.broadcast

        def hearing(name: str, data: Any = None, *, broadcast: Any = broadcast, **more: Any) -> None:
            heard.append((name, dict(data)))
            broadcast(name, data, **more)

        agent.control_server.broadcast = hearing  # type: ignore[method-assign]
    await site.migrate(mode=mode)
    await site.settle()
    assert {name for name, _ in heard} >= set(EVENTS) - {"VM_GONE", "RESCUE", "RESTORE", "JOB_PROGRESS"}
    for name, data in heard:
        _decoded(EVENTS[name], data)


async def test_a_client_that_nobody_here_wrote_reads_it_and_what_it_describes(make_site: MakeSite) -> None:
    site = await make_site()
    client = QMPClient("stranger")
    await client.connect(str(site.agents["a"].config.control_socket))
    try:
        schema = await client.execute("query-qmp-schema")
        assert schema == schema_wire()
        assert await client.execute("query-jobs") == []
        listed: Any = await client.execute("query-commands")
        assert {one["name"] for one in listed} == {*COMMANDS, "qmp_capabilities"}
    finally:
        await client.disconnect()


def test_what_has_no_form_is_a_mistake() -> None:
    schema = Schema()
    with pytest.raises(TypeError, match="no form"):
        schema.event("WRONG", complex)
