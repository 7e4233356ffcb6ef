"""Chats as text: a Jinja template, as in transformers, whose {% generation %} blocks mark what is learnt."""

from __future__ import annotations

from typing import Any

from seqloom.core import BadInput

PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
"""Each turn under its role; what the assistant says is learnt, and that it stops, the rest is read. A model trained with
it is saved with it, and `tokenizer.apply_chat_template` gives the tokens it was trained on: a line end before what is learnt
and an end token after it are where a tokenizer cuts anyway, so that parts and whole are cut alike."""

END = "\ue0ff end \ue0ff"  # what eos_token is while a template is rendered: no text holds it


def chat_parts(messages: Any, key: str, template: str | None = None) -> tuple[tuple[str | None, bool], ...]:
    """The parts (text, learnt) of a chat: messages of {role, content}, as `template` writes them (PLAIN by default).

    The template's bos_token is empty here, since every document begins with a start token; its eos_token is a part of None.
    Raises: BadInput naming the row, for messages that are not a list of {role, content}, or that the template refuses.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BadInput(f"{key}: 'messages' must be a list of {{role, content}}, found {messages!r:.60}")
    for turn in messages:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise BadInput(f"{key}: every message needs 'role' and 'content', found {turn!r:.120}")
    text, learnt = _render(list(messages), key, template or PLAIN)
    spans, at = [], 0
    for begin, end in learnt:
        spans += [(text[at:begin], False), (text[begin:end], True)]
        at = end
    parts: list[tuple[str | None, bool]] = []
    for span, wanted in [*spans, (text[at:], False)]:
        for i, piece in enumerate(span.split(END)):
            parts += [(None, wanted)] * (i > 0) + [(piece, wanted)] * bool(piece)
    return tuple(parts)


def _render(messages: list[dict], key: str, template: str) -> tuple[str, list[tuple[int, int]]]:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), (learnt,) = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, bos_token="", eos_token=END,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise BadInput(f"{key}: the chat template cannot be applied: {error}") from error
    return text, [(begin, end) for begin, end in learnt if end > begin]


def check_template(template: str, name: str) -> str:
    """`template`, if it marks what is learnt. Raises: BadInput, naming `name`."""
    import re

    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise BadInput(
            f"the chat template {name} marks nothing to learn; put {{% generation %}} and {{% endgeneration %}} around what "
            "the assistant says"
        )
    return template
