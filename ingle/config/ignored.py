"""Options that a document sets and that another of its options makes void.

Each is named, so that nobody waits for an effect that does not come.
"""

from __future__ import annotations

from ingle.config.document import Node

#: Options that have no effect where another one is set.
_VOID = (("train.num_epochs", "train.num_steps"), ("optim.warmup_ratio", "optim.warmup_steps"))


def find_ignored(root: Node) -> list[str]:
    """Finds options without effect, and drops a base format that a GGUF file overrules.

    Returns:
        What has no effect and why, in words.
    """
    notes = _imply_format(root)
    for name, cause in _VOID:
        given, decisive = _find(root, name), _find(root, cause)
        if given is not None and decisive is not None and decisive.value is not None:
            where = f" from {given.where}" if given.origin == "file" else ""
            notes.append(f"{name}{where} has no effect: {cause} is set.")
    if _value(root, "objective.kind") == "clm" and _value(root, "data.train_on") == "assistant":
        notes.append("data.train_on has no effect: language modelling (clm) learns from every token.")
    return notes


def _imply_format(root: Node) -> list[str]:
    """Drops the base format where the model is a GGUF file, whose tensors say what they are packed in.

    A model named by a flag wins over a format in the file.  Where both come from the same place the format stays: it is
    for weights that the GGUF file holds as plain numbers, and a contradiction is found when the file is read.
    """
    model, format = _find(root, "model.id"), _find(root, "base.format")
    if model is None or model.origin == "file" or not str(model.value).lower().endswith(".gguf"):
        return []
    if format is None or format.origin == "flag" or format.value in (None, "none"):
        return []
    del root.value["base"]
    return [
        f"base.format={format.value} from {format.where} is left out: the weights of a GGUF file are packed already. "
        f"(--base.format={format.value} packs those that are not.)"
    ]


def _find(root: Node, name: str) -> Node | None:
    node: Node | None = root
    for key in name.split("."):
        node = node.value.get(key) if node is not None and isinstance(node.value, dict) else None
    return node


def _value(root: Node, name: str) -> object:
    node = _find(root, name)
    return None if node is None else node.value
