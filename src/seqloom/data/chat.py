"""Chats as text: a Jinja template, as in transformers, whose {% generation %} blocks mark what is learnt."""

from __future__ import annotations

from typing import Any

from seqloom.core import BadInput

PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}\n\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Turns as "role: content" paragraphs; what the assistant says is learnt, the rest is read. A model trained with it is saved
with it, so that `tokenizer.apply_chat_template` gives what it was trained on."""


def chat_parts(messages: Any, key: str, template: str | None = None) -> tuple[tuple[str, bool], ...]:
    """The parts (text, learnt) of a chat: messages of {role, content}, as `template` writes them (PLAIN by default).

    The template's bos_token and eos_token are empty here: every document begins with a start token and is closed by one.
    Raises: BadInput naming the row, for messages that are not a list of {role, content}, or that the template refuses.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BadInput(f"{key}: 'messages' must be a list of {{role, content}}, found {type(messages).__name__} {messages!r:.60}")
    for turn in messages:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise BadInput(f"{key}: every message needs 'role' and 'content', found {turn!r:.120}")
    text, learnt = _render(list(messages), key, template or PLAIN)
    parts, at = [], 0
    for begin, end in learnt:
        parts += [(text[at:begin], False), (text[begin:end], True)]
        at = end
    parts.append((text[at:], False))
    return tuple(part for part in parts if part[0])


def _render(messages: list[dict], key: str, template: str) -> tuple[str, list[tuple[int, int]]]:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), (learnt,) = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, bos_token="", eos_token="",
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise BadInput(f"{key}: the chat template cannot be applied: {error}") from error
    return text, [(begin, end) for begin, end in learnt if end > begin]


def check_template(template: str, name: str) -> str:
    """`template`, if it marks what is learnt. Raises: BadInput, naming `name`."""
    import re

    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise BadInput(
            f"the chat template {name} marks nothing to learn; put {{% generation %}} ... {{% endgeneration %}} around what the assistant says"
        )
    return template
