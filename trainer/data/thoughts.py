"""Answers behind a generation prompt that opens a thought (DeepSeek-R1, QwQ, Qwen3-Thinking). Knows text only.

Such a prompt ends in "<think>", and serving continues from there. As history the same template drops thoughts, so that
its rendering of an answer does not begin as the served prompt does. Here the answer is put behind the open thought:
with the thought that the message brings, or with none, closed at once.
"""

from __future__ import annotations

from trainer.data.records import Message

CLOSED_BY = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
}


def behind_open_thought(prompt: str, text: str, answer_message: Message) -> str | None:
    """The chat with its last answer, which is this message, as it continues `prompt`.

    text: the template's own rendering of the same chat. None: the prompt opens no thought, or the two differ in more.
    """
    opening = next((tag for tag in CLOSED_BY if prompt.rstrip().endswith(tag)), None)
    if opening is None:
        return None
    before = prompt[: prompt.rindex(opening)]
    if not text.startswith(before):
        return None
    closing, answer = CLOSED_BY[opening], text[len(before) :].lstrip("\n")
    if not answer.strip():
        return prompt
    if answer.startswith(opening) or closing in answer:  # the template keeps thoughts, in spacing of its own
        return prompt + answer.removeprefix(opening).lstrip("\n")
    brought = answer_message.reasoning or answer_message.content.rpartition(closing)[0]
    thought = brought.strip().removeprefix(opening).strip("\n")
    return f"{prompt}{thought}\n{closing}\n\n{answer}"
