"""What langchain does with a chat model and a completion model: invoke, batch, stream, a chain with a parser."""

from __future__ import annotations

import os

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

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
print("invoke, batch, stream, chain, completions")
