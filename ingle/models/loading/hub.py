"""Locates the files of a model: a local folder, or a snapshot of a hub repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ingle import env
from ingle.config.model_names import nearest_path
from ingle.errors import HubUnavailable, ModelError
from ingle.wording import first_line

#: How long to wait for the hub's answer about one file before the cached copy is used.
_ETAG_TIMEOUT_S = 10

#: Small files: config, tokenizer, template, index of the shards.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_WEIGHTS = ("*.safetensors",)

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_HUB_FILE = re.compile(r"^(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/(?P<file>[^/].*)$")

Part = Literal["small", "weights"]


def locate(
    name: str, *, revision: str | None = None, part: Part = "small", code: bool = False, option: str = "model.id"
) -> Path:
    """Returns the folder that contains the files of a model.

    Args:
        name: A local folder or a hub id.
        revision: Branch, tag or commit on the hub.
        part: ``small`` fetches configs and tokenizer only, ``weights`` the safetensors too.
        code: Also fetch Python files (``model.trust_remote_code``).
        option: Where the name was given, for errors.

    Raises:
        ModelError: There is no such folder or repository.
        HubUnavailable: The hub is needed and cannot be reached.
    """
    folder = Path(name).expanduser()
    if (folder / "run.yaml").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{name} is a run folder, not a model.",
            where=option,
            fix=f"`ingle export {name} --to safetensors --out FOLDER` writes its model to a folder",
        )
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(
            f"{name} is a file; a model is a folder or a hub id.",
            where=option,
            fix="use the folder that contains config.json and the .safetensors files",
        )
    if not _HUB_ID.match(name):
        raise ModelError(f"There is no folder {name}.", where=option, fix=_suggest(name))
    patterns = [*_SMALL, *(_WEIGHTS if part == "weights" else ()), *(("*.py",) if code else ())]
    return _fetch(name, revision, patterns, ["original/*"] if code else ["original/*", "*/*"], option)


def locate_file(name: str, *, revision: str | None = None, option: str = "model.id") -> Path:
    """Returns the file of a model that is a single file: a local path, or ``owner/name/file`` on the hub.

    Raises:
        ModelError: There is no such file.
        HubUnavailable: The hub is needed and cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    match = _HUB_FILE.match(name)
    if match is None:
        raise ModelError(f"There is no file {name}.", where=option, fix=_suggest(name))
    # A model may be split into several files: all are fetched.
    pattern = re.sub(r"-\d{5}-of-(\d{5})\.", r"-*-of-\1.", match["file"])
    found = _fetch(match["repository"], revision, [pattern], None, option) / match["file"]
    if not found.is_file():
        raise ModelError(f"{match['repository']} on the hub contains no file {match['file']}.", where=option)
    return found


def _suggest(name: str) -> str:
    near = nearest_path(name)
    return f"did you mean {near}?" if near else "check the path"


def _fetch(name: str, revision: str | None, patterns: list[str], ignored: list[str] | None, option: str) -> Path:
    offline = env.hub_offline()
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=ignored,
                local_files_only=offline,
                etag_timeout=_ETAG_TIMEOUT_S,
            )
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: its owner requires you to accept terms first.",
            where=option,
            why=first_line(error),
            fix="accept the terms on the model's page, then log in with `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{name} has no revision {revision}.", where="model.revision", fix="name a branch, tag or commit"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"There is no folder {name}, and no model of that name on the hub.",
            where=option,
            fix="check the spelling; for a private model log in with `hf auth login`",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        cause = "hub access is off (HF_HUB_OFFLINE)" if offline else f"the hub did not answer ({first_line(error)})"
        raise HubUnavailable(
            f"There is no folder {name}, and the hub cannot be reached for a model of that name.",
            where=option,
            why=f"{cause} and the model is not in the local cache",
            fix="name a local folder, or go online once so that the model is cached",
        ) from error
