"""Reading the text of a config file, whatever the path turns out to name."""

from __future__ import annotations

import difflib
import os
import stat
from pathlib import Path

from ingle.errors import ConfigError

#: Bytes of a config file.  Real ones take a few hundred; parsing this many takes a few seconds.
_MAX_BYTES = 256 << 10


def read_config(path: Path) -> str:
    """The text of a config file.

    Raises:
        ConfigError: It does not exist, is not a regular file, is too large, or is not UTF-8.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(
                    "The config is a pipe or a device.", where=str(path), fix="write it into a file and name that"
                )
            content = file.read(_MAX_BYTES + 1)
    except IsADirectoryError:
        raise _is_folder(path) from None
    except (FileNotFoundError, NotADirectoryError):
        raise _is_missing(path) from None
    except (OSError, ValueError) as error:  # a ValueError is about a NUL in the path
        raise ConfigError(
            "The config file cannot be read.", where=str(path), why=getattr(error, "strerror", None) or str(error)
        ) from None
    if len(content) > _MAX_BYTES:
        raise ConfigError(
            "The config file is too large.",
            where=str(path),
            why=f"it has {status.st_size:,} bytes; configs of up to {_MAX_BYTES:,} are read",
            fix="name a YAML file with options; data goes into data.sources",
        )
    return _decode(content, path)


def _open_at_once(path: str, flags: int) -> int:
    """Opens without waiting: a pipe that nobody writes to would block for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def _decode(content: bytes, path: Path) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        why = "it is UTF-16"
    else:
        try:
            return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            why = f"the byte 0x{content[error.start]:02x} in line {line}"
    raise ConfigError(
        "The config file is not UTF-8 text.", where=str(path), why=why, fix="save it as UTF-8 in your editor"
    )


def _is_folder(path: Path) -> ConfigError:
    fix = None
    if (path / "run.yaml").exists():
        fix = f"ingle train --resume {path} continues the run in it; its config is {path / 'run.yaml'}"
    elif found := sorted(str(entry) for entry in path.glob("*.y*ml")):
        fix = f"name a file in it: {', '.join(found[:5])}"
    return ConfigError("The config is a folder, not a YAML file.", where=str(path), fix=fix)


def _is_missing(path: Path) -> ConfigError:
    """The error for a config that is not there; names the file that was probably meant."""
    found = [str(entry) for entry in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
    found += [str(entry) for entry in sorted(Path().glob(f"*/{path.name}")) + sorted(Path().glob(f"*/*/{path.name}"))]
    near = difflib.get_close_matches(str(path), found, n=1, cutoff=0.7)
    near = near or [name for name in found if Path(name).name == path.name][:1]
    fix = f"did you mean {near[0]}?" if near else f"there is {', '.join(found[:5])}" if found else None
    return ConfigError("The config file does not exist.", where=str(path), fix=fix)
