import pytest

from ecomjax.errors import UserError
from ecomjax.tasks.base import Prompt
from ecomjax.tasks.prompts import render

PROMPT = Prompt("Do it.", (("one {x}", "1"),), "two {instruction}")


def chat(messages):
    return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def test_chat_goes_through_the_template():
    expected = "<system>Do it.<user>one {x}<assistant>1<user>two {instruction}<assistant>"
    assert render(PROMPT, "chat", chat) == expected


def test_alpaca_is_one_instruction_without_input_block():
    text = render(PROMPT, "alpaca", chat)
    assert text.endswith(
        "### Instruction:\nDo it.\n\none {x}\n1\n\ntwo {instruction}\n\n### Response:\n"
    )
    assert "### Input" not in text and text.count("###") == 2


@pytest.mark.parametrize("format", ["chat", "alpaca"])
def test_prompts_share_all_before_the_input(format):
    one = render(PROMPT, format, chat)
    other = render(Prompt(PROMPT.system, PROMPT.turns, "three"), format, chat)
    shared = one[: one.index(PROMPT.user)]
    assert other.startswith(shared + "three")


def test_unknown_format():
    with pytest.raises(UserError, match=r"unknown prompt format 'llama'.*known: chat, alpaca"):
        render(PROMPT, "llama", chat)
