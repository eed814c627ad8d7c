"""Renders simple chat templates without the checks of ``apply_chat_template``, which take longer than the template.

transformers converts every message, copies all global names, and reads the special tokens for each rendering. Most
templates use nothing of that but ``messages`` and the special tokens. They are compiled here, in a sandbox of the same
kind and with the same options. The first renderings are compared with those of transformers, and whatever differs, or
raises an error, is left to transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ingle.data.types import Message, Tokenizer

#: Renderings that are compared.
_COMPARED = 64
#: Names that have the same meaning in every Jinja environment; transformers defines others in its own way.
_NAMES = frozenset({"messages", "add_generation_prompt", "tools", "documents", "raise_exception", "namespace", "range"})


class ChatRenderer:
    """Renders conversations as ``tokenizer.apply_chat_template`` does, with the same results and errors.

    The template is compiled by the first rendering, so that its limits hold for compilation, too.

    Args:
        tokenizer: With or without a chat template.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._source: Any = None
        self._compiled: Callable[[Mapping[str, Any]], str] | None = None
        self._compared = 0

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: str = "") -> str:
        """Returns the text of a conversation with its tools, a JSON list; raises whatever the template raises."""
        source = self._tokenizer.chat_template
        if source is not self._source:
            self._source, self._compared = source, 0
            self._compiled = _compile(source, getattr(self._tokenizer, "special_tokens_map", None))
        conversation = list(map(as_mapping, messages))
        options: dict[str, Any] = {"tools": json.loads(tools)} if tools else {}
        text = None
        if self._compiled is not None and conversation:
            try:
                given = {"messages": conversation, "add_generation_prompt": add_generation_prompt}
                text = self._compiled(given | options)
            except MemoryError:
                raise
            except Exception:
                text = None  # transformers raises the error
        if text is not None and self._compared >= _COMPARED:
            return text
        usual = str(
            self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        )
        self._compared += 1
        if text is not None and text != usual:
            self._compiled = None
        return usual


def as_mapping(message: Message) -> dict[str, Any]:
    """Returns a message as templates read it."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        found["tool_calls"] = json.loads(message.tool_calls)
    if message.name:
        found["name"] = message.name
    if message.call_id:
        found["tool_call_id"] = message.call_id
    return found


def _compile(source: Any, special_tokens: Any) -> Callable[[Mapping[str, Any]], str] | None:
    """Returns a function from variables to text; None if the template may depend on anything else."""
    if not isinstance(source, str) or not isinstance(special_tokens, Mapping):
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals = {
        "raise_exception": _raise,
        "namespace": environment.globals["namespace"],
        "range": environment.globals["range"],
    }
    try:
        tree = environment.parse(source)
        if not _is_simple(tree, special_tokens.keys()):
            return None
        template = environment.from_string(source)
    except jinja2.TemplateError:
        return None
    fixed = {**environment.globals, **special_tokens, "tools": None, "documents": None}

    def render(variables: Mapping[str, Any]) -> str:
        # `Template.render` merges the globals into a new mapping each time, which takes longer than a short template.
        context = template.new_context(fixed | dict(variables), shared=True)
        return "".join(template.root_render_func(context))

    return render


def _is_simple(tree: nodes.Template, special_tokens: Any) -> bool:
    """Returns whether a template uses only what means the same here and in transformers."""
    # Names that are not defined are empty in both, except those that transformers or Jinja define.
    defined = {"dict", "strftime_now", "lipsum", "cycler", "joiner", "self", "super", "caller"}
    names = meta.find_undeclared_variables(tree) | {node.name for node in tree.find_all(nodes.Name)}
    if names & (defined - _NAMES - set(special_tokens)) or _NAMES & set(special_tokens):
        return False
    if any(node.name == "tojson" for node in tree.find_all(nodes.Filter)):
        return False
    # transformers forbids names that begin with an underscore in a namespace.
    if any(node.attr.startswith("_") for node in tree.find_all(nodes.NSRef)):
        return False
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == "namespace":
            keys = [pair.key for pair in call.kwargs]
            if call.args or call.dyn_args or call.dyn_kwargs or any(key.startswith("_") for key in keys):
                return False
    return not any(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block)))


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
