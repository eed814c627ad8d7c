"""Serves a local copy of the Hugging Face hub, with the requests that ``huggingface_hub`` and ``datasets`` make."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

#: Every repository has one commit.
COMMIT = "c0ffee" + "0" * 34

_API = re.compile(r"/api/(models|datasets)/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<rest>.*))?")
_FILE = re.compile(r"(?:/(?P<kind>datasets))?/(?P<name>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.*)")


@contextmanager
def serve_hub(repositories: dict[str, Path], *, datasets: dict[str, Path]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Serves folders as repositories while the block runs.

    Args:
        repositories: Folders of models by ``owner/name``; read for every request.
        datasets: Folders of datasets by ``owner/name``.

    Yields:
        The address, for ``HF_ENDPOINT``, and a function that stops the hub.
    """
    folders = {("models", name): folder for name, folder in repositories.items()}
    folders |= {("datasets", name): folder for name, folder in datasets.items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # no connection outlives its request

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            path = unquote(address.path)
            if match := _FILE.fullmatch(path):
                self._send_file(folders.get((match["kind"] or "models", match["name"])), match["file"])
            elif match := _API.fullmatch(path):
                folder = folders.get((match[1], match["name"]))
                if folder is None:
                    self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                elif match["what"] == "tree":
                    self._send(_entries(folder, match["rest"].partition("/")[2], parse_qs(address.query)))
                else:
                    siblings = [{"rfilename": name} for name in _names(folder)]
                    self._send({"id": match["name"], "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
            else:
                self._send({"error": "Not found"}, 404)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            match = _API.fullmatch(unquote(urlsplit(self.path).path))
            text = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
            asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
            folder = folders.get((match[1], match["name"])) if match else None
            if folder is None:
                self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            else:
                found = _entries(folder, "", {"recursive": ["true"]})
                self._send([entry for entry in found if entry["path"] in asked])

        def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self._send_bytes(
                json.dumps(content).encode(), status, {"Content-Type": "application/json"} | (headers or {})
            )

        def _send_file(self, folder: Path | None, name: str) -> None:
            if folder is None or name not in _names(folder):
                code = "RepoNotFound" if folder is None else "EntryNotFound"
                self._send({"error": "Not found"}, 404, {"X-Error-Code": code})
                return
            content = (folder / name).read_bytes()
            self._send_bytes(content, 200, {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT})

        def _send_bytes(self, content: bytes, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *words: Any) -> None:
            """Prints nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    try:
        yield f"http://127.0.0.1:{server.server_port}", close
    finally:
        close()


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entries(folder: Path, below: str, query: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Returns files, and folders if the listing is not recursive, as the hub lists them."""
    prefix = f"{below}/" if below else ""
    found: dict[str, dict[str, Any]] = {}
    for name in _names(folder):
        if not name.startswith(prefix):
            continue
        inside = name.removeprefix(prefix)
        if "/" in inside and query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            path = prefix + inside.partition("/")[0]
            found[path] = {"type": "directory", "path": path, "size": 0, "oid": _digest(path.encode())}
        else:
            content = (folder / name).read_bytes()
            found[name] = {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
    return list(found.values())
