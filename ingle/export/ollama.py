"""An Ollama ``Modelfile``: where the weights are, how a conversation is rendered, what ends an answer.

Ollama renders conversations with a Go template.  It is written only where it is certain: the model's own template is
rendered on probes, and must give, character for character, what a family's Go template would.

Source: https://github.com/ollama/ollama/blob/main/docs/modelfile.md and ``docs/template.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ingle.data import Message, render
from ingle.errors import DataError


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of chat template.

    Attributes:
        name: What it is called.
        turn: One message, with ``{role}`` and ``{content}``.
        opening: What asks for an answer.
        begin: What stands before the first message; llama.cpp puts it there by itself.
    """

    name: str
    turn: str
    opening: str
    begin: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation whose answer is about to begin."""
        turns = "".join(self.turn.format(role=m.role, content=m.content) for m in messages)
        return self.begin + turns + self.opening

    def go_template(self) -> str:
        """The same as a Go template."""
        turn = self.turn.format(role="{{ .Role }}", content="{{ .Content }}")
        return f"{{{{- range .Messages }}}}{turn}{{{{ end }}}}{self.opening}"


FAMILIES = (
    Family("ChatML", "<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"),
    Family(
        "Llama 3",
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|>",
    ),
)

_ASKED = (Message("user", "First question?"),)
_LONG = (*_ASKED, Message("assistant", "An answer."), Message("user", "Second question?"))
_SYSTEM = Message("system", "Be brief.")


def recognise(tokenizer: Any) -> tuple[Family, str | None] | None:
    """The family of a model's template and the system message that it adds by itself; None where it is no known one."""
    if not tokenizer.chat_template:
        return None
    for family in FAMILIES:
        try:
            with_system = [render(tokenizer, (_SYSTEM, *m), add_generation_prompt=True) for m in (_ASKED, _LONG)]
            without = [render(tokenizer, m, add_generation_prompt=True) for m in (_ASKED, _LONG)]
        except DataError:
            return None
        if with_system != [family.render((_SYSTEM, *m)) for m in (_ASKED, _LONG)]:
            continue
        if without == [family.render(m) for m in (_ASKED, _LONG)]:
            return family, None
        added = _added_system(family, without[0])
        if added is not None and without == [family.render((Message("system", added), *m)) for m in (_ASKED, _LONG)]:
            return family, added
    return None


def make_modelfile(
    tokenizer: Any, end_token_ids: Sequence[int], *, weights: str, adapter: str | None = None, notes: Sequence[str] = ()
) -> str:
    """The content of a ``Modelfile``.

    Args:
        tokenizer: Of the model.
        end_token_ids: What ends an answer.
        weights: Behind ``FROM``: a path from the folder of the Modelfile, or a model's name.
        adapter: A LoRA GGUF, as a path from the same folder.
        notes: Comments at the top.
    """
    lines = [f"# {note}" for note in notes]
    lines.append(f"FROM {weights}")
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    found = recognise(tokenizer)
    if found is None:
        reason = "this model has no chat template."
        if tokenizer.chat_template:
            reason = f"this chat template is none of {', '.join(family.name for family in FAMILIES)}.  Ollama looks at "
            reason += "the one inside the file; check what `ollama show --template` says."
        lines.append(f"# No TEMPLATE is written: {reason}")
    else:
        family, system = found
        lines.append(f"# {family.name}, checked against the model's own template")
        lines.append(f'TEMPLATE """{family.go_template()}"""')
        if system is not None:
            lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(token)}"' for token in sorted(end_token_ids)]
    return "\n".join(lines) + "\n"


def _added_system(family: Family, text: str) -> str | None:
    """The system message that a template puts before a conversation which has none."""
    before, _, after = family.turn.format(role="system", content="\0").partition("\0")
    rest = text.removeprefix(family.begin)
    if not rest.startswith(before) or after not in rest:
        return None
    return rest[len(before) :].partition(after)[0]
