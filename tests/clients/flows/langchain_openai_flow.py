"""What langchain does with a chat and a completion model: invoke, batch, stream, a chain with a parser, a tool."""

from __future__ import annotations

import os
from typing import Literal

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

URL, KEY, MODEL = (os.environ[name] for name in ("CLIENT_URL", "CLIENT_KEY", "CLIENT_MODEL"))

chat = ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, temperature=0, stream_usage=True)
answer = chat.invoke([("system", "Be brief."), ("human", "Who pays for repairs?")])
assert answer.content
assert answer.usage_metadata["output_tokens"] > 0
chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | chat | StrOutputParser()
answers = chain.batch([{"question": question} for question in ("Who pays?", "When is rent due?", "Who pays?")])
assert answers[0] == answers[2]
assert "".join(chain.stream({"question": "Who pays?"})) == answers[0]
completed = OpenAI(model=MODEL, base_url=URL, api_key=KEY, temperature=0, max_tokens=6).invoke("Hello")
assert completed


@tool
def repair(room: Literal["kitchen", "bathroom"]) -> str:  # the demo base writes a free string without end
    """Sends a craftsman to a room."""
    return f"{room}: done"


class Verdict(BaseModel):
    """Who pays."""

    tenant_pays: bool


caller = chat.bind_tools([repair], tool_choice="required", parallel_tool_calls=False, strict=True)
called = caller.invoke("The kitchen is broken.")
[call] = called.tool_calls
assert call["name"] == "repair"
assert isinstance(call["args"]["room"], str)
result = repair.invoke(call)
assert chat.bind_tools([repair]).invoke([("human", "The kitchen is broken."), called, result]) is not None
assert isinstance(chat.with_structured_output(Verdict).invoke("Who pays?"), Verdict)
told = ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, temperature=0, use_responses_api=True).invoke("Who pays?")
assert told.text
print("invoke, batch, stream, chain, completions, tool, structured output, responses")
