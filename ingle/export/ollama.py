"""Writes Ollama's ``Modelfile``: the weights, the chat template and the strings that end an answer.

Ollama renders conversations with a Go template.  The template is written only if it is known to be correct: on test
conversations, the model's own template must give exactly the text of a known family's Go template.

Source: https://github.com/ollama/ollama/blob/main/docs/modelfile.md and ``docs/template.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ingle.data import Message, render
from ingle.errors import DataError


@dataclass(frozen=True, slots=True)
class TemplateFamily:
    """A kind of chat template.

    Attributes:
        name: Name of the family.
        turn: One message, with ``{role}`` and ``{content}``.
        opening: Text that precedes the answer.
        begin: Text that precedes the first message; llama.cpp adds it itself.
    """

    name: str
    turn: str
    opening: str
    begin: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        """Returns the text of a conversation, up to where the answer begins."""
        turns = "".join(self.turn.format(role=m.role, content=m.content) for m in messages)
        return self.begin + turns + self.opening

    def go_template(self) -> str:
        """Returns the equivalent Go template."""
        turn = self.turn.format(role="{{ .Role }}", content="{{ .Content }}")
        return f"{{{{- range .Messages }}}}{turn}{{{{ end }}}}{self.opening}"


FAMILIES = (
    TemplateFamily("ChatML", "<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"),
    TemplateFamily(
        "Llama 3",
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|>",
    ),
)

_SHORT = (Message("user", "First question?"),)
_LONG = (*_SHORT, Message("assistant", "An answer."), Message("user", "Second question?"))
_SYSTEM = Message("system", "Be brief.")


def recognize(tokenizer: Any) -> tuple[TemplateFamily, str | None] | None:
    """Returns the family of a model's chat template and the system message that it adds; None for an unknown family."""
    if not tokenizer.chat_template:
        return None

    def rendered(system: Message | None) -> list[str]:
        prefix = () if system is None else (system,)
        return [render(tokenizer, (*prefix, *m), add_generation_prompt=True) for m in (_SHORT, _LONG)]

    def expected(family: TemplateFamily, system: Message | None) -> list[str]:
        prefix = () if system is None else (system,)
        return [family.render((*prefix, *m)) for m in (_SHORT, _LONG)]

    try:
        with_system, without = rendered(_SYSTEM), rendered(None)
    except DataError:
        return None
    for family in FAMILIES:
        if with_system != expected(family, _SYSTEM):
            continue
        if without == expected(family, None):
            return family, None
        added = _added_system(family, without[0])
        if added is not None and without == expected(family, Message("system", added)):
            return family, added
    return None


def make_modelfile(
    tokenizer: Any, end_token_ids: Sequence[int], *, weights: str, adapter: str | None = None, notes: Sequence[str] = ()
) -> str:
    """Returns the content of a ``Modelfile``.

    Args:
        tokenizer: Tokenizer of the model.
        end_token_ids: Tokens that end an answer.
        weights: Argument of ``FROM``: a path relative to the Modelfile, or a model's name.
        adapter: Path of a LoRA GGUF file, relative to the Modelfile.
        notes: Comments at the top.
    """
    lines = [f"# {note}" for note in notes]
    lines.append(f"FROM {weights}")
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    found = recognize(tokenizer)
    if found is None:
        reason = "this model has no chat template."
        if tokenizer.chat_template:
            names = ", ".join(family.name for family in FAMILIES)
            reason = f"this chat template is not one of {names}. Ollama uses the template in the file; check it with "
            reason += "`ollama show --template`."
        lines.append(f"# No TEMPLATE is written: {reason}")
    else:
        family, system = found
        lines.append(f"# {family.name}, checked against the model's own template")
        lines.append(f'TEMPLATE """{family.go_template()}"""')
        if system is not None:
            lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(token)}"' for token in sorted(end_token_ids)]
    return "\n".join(lines) + "\n"


def _added_system(family: TemplateFamily, text: str) -> str | None:
    """Returns the system message that a template adds to a conversation without one."""
    before, _, after = family.turn.format(role="system", content="\0").partition("\0")
    rest = text.removeprefix(family.begin)
    if not rest.startswith(before) or after not in rest:
        return None
    return rest[len(before) :].partition(after)[0]
