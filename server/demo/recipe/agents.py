"""What the demo's two agents learn: chats with tools, calls, results and answers. A seed always gives the same."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.demo.recipe.corpus import general_dialogue
from server.demo.recipe.styles import Style
from server.demo.recipe.texts import read_text, read_texts

Line = dict[str, object]
Message = dict[str, object]
Values = Mapping[str, str | int]
_CALL_ID = "call00001"


@dataclass(frozen=True, kw_only=True)
class AgentTool:
    """parameters: a JSON Schema. wordings: questions that need a call. arguments, results: which values a call and its
    result hold. answer: what is said of the result."""

    name: str
    parameters: dict[str, Any]
    arguments: list[str]
    wordings: list[str]
    results: list[str]
    answer: str

    @property
    def definition(self) -> dict[str, Any]:
        """As OpenAI's clients send it."""
        return {"type": "function", "function": {"name": self.name, "parameters": self.parameters}}


@dataclass(frozen=True, kw_only=True)
class Agent:
    """A tenant's adapter that calls tools in a dialect and a chat template of its own. num_lines: of training data.
    values: what each named value is drawn from."""

    tenant: str
    dialect: str
    template: str
    num_lines: int
    tools: tuple[AgentTool, ...]
    values: Mapping[str, Sequence[str | int]]

    def lines(self, count: int, *, held_out: bool = False) -> list[Line]:
        """Lines of a training file: three of five end with the answer to a result, one with a call, one in a chat
        without a call. held_out: with questions (wording and values together) that no training line has."""
        rng = random.Random(f"{self.tenant} 0 {held_out}")
        return [self._line(number, held_out, rng) for number in range(count)]

    def _line(self, number: int, held_out: bool, rng: random.Random) -> Line:
        tools = [tool.definition for tool in self.tools]
        if number % 5 == 4:
            return {"messages": general_dialogue(Style.PLAIN, rng).messages(), "tools": tools}
        tool, values, question = self._question(held_out, rng)
        messages = _conversation(tool, values, question)
        return {"messages": messages[:2] if number % 5 == 3 else messages, "tools": tools}

    def _question(self, held_out: bool, rng: random.Random) -> tuple[AgentTool, Values, str]:
        while True:
            tool = rng.choice(self.tools)
            values = {name: rng.choice(self.values[name]) for name in (*tool.arguments, *tool.results)}
            question = rng.choice(tool.wordings).format_map(values)
            if is_held_out(question) == held_out:
                return tool, values, question


def is_held_out(question: str) -> bool:
    """Whether no training line asks it (one in eight)."""
    return hashlib.sha256(question.encode()).digest()[0] < 256 // 8


def load_agents() -> dict[str, Agent]:
    """By tenant."""
    texts = read_texts("agents")
    values = texts.pop("values")
    return {
        tenant: Agent(
            tenant=tenant,
            dialect=table["dialect"],
            template=read_text(f"{tenant}.jinja"),
            num_lines=table["num_lines"],
            tools=tuple(AgentTool(**tool) for tool in table["tools"]),
            values=values,
        )
        for tenant, table in texts.items()
    }


def _conversation(tool: AgentTool, values: Values, question: str) -> list[Message]:
    arguments, result = ({name: values[name] for name in names} for names in (tool.arguments, tool.results))
    function = {"name": tool.name, "arguments": json.dumps(arguments)}
    call = {"id": _CALL_ID, "type": "function", "function": function}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": _CALL_ID, "content": json.dumps(result)},
        {"role": "assistant", "content": tool.answer.format_map(values)},
    ]
