"""The shipped agent calls its tools as trained, on questions that training never had."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from adapters_store.dialects.catalog import DIALECTS
from adapters_store.format.chat_fields import DIALECT_FIELD, TEMPLATE_FIELD
from server.demo.assets import demo_agents, demo_base_path
from server.demo.recipe.agents import Agent, is_held_out, load_agents
from server.engine.grammar.compiler import compiler_for
from server.engine.text.tokenizer import Tokenizer
from server.jobs.gate import calls
from support.servers.service import Service, running
from trainer.data.records import Record, parse_record

NUM_QUESTIONS = 10


@pytest.fixture(scope="module")
def agents() -> dict[str, Agent]:
    """Those that are shipped."""
    every = load_agents()
    return {tenant: every[tenant] for tenant in demo_agents()}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(demo_base_path(), demo_agents(), tmp_path_factory.mktemp("data"), dtype="auto") as service:
        yield service


def held_out_calls(agent: Agent) -> list[Record]:
    """Chats that end with a call."""
    lines = (line for line in agent.lines(60, held_out=True) if len(list(line["messages"])) == 2)  # type: ignore[call-overload]
    records = [parse_record(json.dumps(line).encode()) for line in lines]
    return [record for record in records if record.messages[-1].calls][:NUM_QUESTIONS]


def test_tools_are_called_right_in_shared_steps(service: Service, agents: dict[str, Agent]) -> None:
    tokenizer = Tokenizer.load(demo_base_path())
    compiler = compiler_for(tokenizer, tokenizer.vocabulary(service.parts.base.num_embeddings))
    cases = [
        (tenant, calls._case(tokenizer, compiler, DIALECTS[agent.dialect], agent.template, record))
        for tenant, agent in agents.items()
        for record in held_out_calls(agent)
    ]
    compiler.close()
    steps = service.stats().counters["steps"]
    with service.held():
        asked = [
            service.ask(
                case.prompt_ids,
                tenant,
                constraint=case.constraint,
                max_tokens=calls.MAX_CALL_TOKENS,
                ignore_eos=False,
                end_ids=tuple(tokenizer.chat_end_ids),
            )[1]
            for tenant, case in cases
        ]
    answers = [answer.tokens() for answer in asked]
    for tenant in agents:
        right = [
            calls._read(tokenizer, case, ids) == case.expected
            for (owner, case), ids in zip(cases, answers, strict=True)
            if owner == tenant
        ]
        assert len(right) == NUM_QUESTIONS
        assert sum(right) >= 0.8 * NUM_QUESTIONS, tenant
    assert service.stats().counters["steps"] - steps < max(map(len, answers)) + NUM_QUESTIONS


def test_a_shipped_agent_is_small_and_carries_its_dialect_and_template(agents: dict[str, Agent]) -> None:
    assert demo_agents().keys() == agents.keys()
    for tenant, folder in demo_agents().items():
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert (folder / "adapter_model.safetensors").stat().st_size < 300_000
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "multilora-demo-base"
        assert (config[DIALECT_FIELD], config[TEMPLATE_FIELD]) == (agents[tenant].dialect, agents[tenant].template)


def test_training_lines_hold_no_held_out_question(agents: dict[str, Agent]) -> None:
    for agent in agents.values():
        lines = agent.lines(300)
        assert lines == agent.lines(300)
        asked = [str(record.messages[0].content) for record in map(parsed, lines) if record.messages[1].calls]
        assert not any(map(is_held_out, asked))
        assert all(map(is_held_out, (str(record.messages[0].content) for record in held_out_calls(agent))))


def parsed(line: dict[str, object]) -> Record:
    return parse_record(json.dumps(line).encode())
