"""Texts of prompts, and how a prompt becomes the one text a model continues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from ecomjax.errors import UserError
from ecomjax.tasks.base import Prompt

PromptFormat = Literal["chat", "alpaca"]

PERSONA = "You are an e-commerce expert."

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The wrapper of Stanford Alpaca for instructions without an input block."""


def render(prompt: Prompt, format: str, chat: Callable[[list[dict[str, str]]], str]) -> str:
    """The text that ends exactly where the answer starts.

    Args:
        prompt: what is asked.
        format: "chat": messages of system, user and assistant through the chat template
            of the tokenizer; "alpaca": one instruction that holds everything, each
            demonstration as its input, a line break and its answer.
        chat: the chat template, from messages of role and content to the text up to and
            including the header of the assistant's next message.
    """
    if format == "chat":
        messages = [{"role": "system", "content": prompt.system}]
        for user, answer in prompt.turns:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": answer})
        return chat([*messages, {"role": "user", "content": prompt.user}])
    if format == "alpaca":
        shown = (f"{user}\n{answer}" for user, answer in prompt.turns)
        # Plain replacement: the inputs may hold braces.
        return ALPACA.replace("{instruction}", "\n\n".join([prompt.system, *shown, prompt.user]))
    raise UserError(
        f"unknown prompt format '{format}'",
        "prompt format",
        f"known: {', '.join(get_args(PromptFormat))}",
    )
