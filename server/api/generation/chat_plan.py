"""How one chat is asked and answered: the prompt's tokens, what the answer may hold, and the grammar for it."""

from __future__ import annotations

from dataclasses import replace

from adapters_store.dialects.catalog import DIALECTS, dialect_of
from adapters_store.dialects.dialect import Dialect
from adapters_store.dialects.reasoning import reasoning_of
from server.api.context import ApiContext
from server.api.generation.build_call import Prepared, check_length
from server.api.generation.fields.tools import NamedTool, Tool
from server.api.generation.schemas import ChatBody
from server.api.target import Target
from server.engine.grammar.compiler import AskedGrammar
from server.engine.grammar.spec import GrammarSpec
from server.engine.request import InvalidRequest
from server.engine.text.answer_plan import answer_form, marker_ids
from server.engine.text.answer_reader import AnswerForm
from server.engine.text.call_grammar import ANSWER, CallsPart, Choice, ReasoningPart, answer_grammar
from server.engine.text.chat_options import ChatOptions
from server.engine.text.tokenizer import Tokenizer


def check_tools(body: ChatBody) -> None:
    """Raises InvalidRequest for tool fields that do not go together."""
    if body.tool_choice not in (None, "none", "auto") and not body.tools:
        raise InvalidRequest("tool_choice", "tool_choice is allowed only with tools")
    if isinstance(body.tool_choice, NamedTool) and body.tool_choice.function.name not in _names(body):
        name = body.tool_choice.function.name
        raise InvalidRequest("tool_choice", f"tool_choice: {name!r} is none of the tools")
    budgets = {body.reasoning_budget, body.thinking_token_budget} - {None}
    if len(budgets) > 1:
        raise InvalidRequest("reasoning_budget", "reasoning_budget and thinking_token_budget differ; send one of them")


def _names(body: ChatBody) -> list[str]:
    return [tool.function.name for tool in body.tools or ()]


def planned(context: ApiContext, body: ChatBody, target: Target, asked: AskedGrammar | None) -> Prepared:
    """asked: what the answer must follow behind its reasoning. Raises InvalidRequest, also for what the chat template
    refuses."""
    tokenizer, options = context.engine.tokenizer, _options(context, body, target)
    messages = [message.for_template() for message in body.messages]
    check_length(context, "messages", sum(message.num_chars for message in body.messages))
    ids = tokenizer.encode_chat(messages, options)
    template = options.template or tokenizer.chat_template
    dialect = options.dialect if body.tools else None
    form = answer_form(tokenizer, ids, None if body.tool_choice == "none" else dialect, reasoning_of(template))
    budget = body.thinking_token_budget if body.reasoning_budget is None else body.reasoning_budget
    reasoning = _reasoning_part(tokenizer, form, budget)
    calls = None if dialect is None else _calls_part(body, dialect)
    read = None if form.is_plain else form
    if calls is None and budget is None and (asked is None or reasoning is None):
        return Prepared([ids], form=read, grammar=asked)
    ids_of_marks = marker_ids(tokenizer, dialect, form.reasoning)
    if asked is not None:
        before = answer_grammar(ids_of_marks, reasoning=reasoning, text=ANSWER)
        return Prepared([ids], form=read, grammar=asked._replace(spec=replace(asked.spec, before=before)))
    lark = answer_grammar(ids_of_marks, reasoning=reasoning, calls=calls)
    field = "tools" if calls is not None else "reasoning_budget"
    return Prepared([ids], form=read, grammar=AskedGrammar(field, GrammarSpec("lark", lark)))


def _options(context: ApiContext, body: ChatBody, target: Target) -> ChatOptions:
    """A message to continue ends without a new turn, unless the client sets add_generation_prompt."""
    is_continued = bool(body.continue_final_message)
    opens_turn = not is_continued if body.add_generation_prompt is None else body.add_generation_prompt
    template = target.chat_template
    own = DIALECTS.get(target.tool_dialect or "")
    return ChatOptions(
        add_generation_prompt=opens_turn,
        continue_final_message=is_continued,
        escape_control_tokens=context.settings.escape_control_tokens,
        variables=body.chat_template_kwargs or {},
        tools=[tool.for_template() for tool in body.tools or ()],
        dialect=own or dialect_of(template or context.engine.tokenizer.chat_template),
        template=template,
    )


def _calls_part(body: ChatBody, dialect: Dialect) -> CallsPart:
    tools: list[Tool] = list(body.tools or ())
    choice: Choice = "required" if isinstance(body.tool_choice, NamedTool) else body.tool_choice or "auto"
    if isinstance(body.tool_choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == body.tool_choice.function.name]
    defined = [tool.for_grammar() for tool in tools]
    is_parallel = body.parallel_tool_calls is not False
    return CallsPart(dialect=dialect, tools=defined, choice=choice, is_parallel=is_parallel)


def _reasoning_part(tokenizer: Tokenizer, form: AnswerForm, budget: int | None) -> ReasoningPart | None:
    """Raises InvalidRequest for a budget of a model whose reasoning has no mark, or one of several tokens."""
    if form.reasoning is None:
        if budget is None:
            return None
        raise InvalidRequest("reasoning_budget", "reasoning_budget: this model's chat template marks no reasoning")
    if budget is not None and form.reasoning.close not in form.marker_ids:
        reason = f"this model has no token for {form.reasoning.close}, so its reasoning cannot be counted"
        raise InvalidRequest("reasoning_budget", f"reasoning_budget: {reason}")
    shut_ids = tuple(tokenizer.marker_ids)
    return ReasoningPart(marks=form.reasoning, is_open=form.starts_in_reasoning, budget=budget, shut_ids=shut_ids)
