"""A judge: another model grades or compares answers, over an OpenAI-compatible server."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ingle import env
from ingle.errors import RewardError

if TYPE_CHECKING:
    from ingle.rewards.functions import Answers

_FIELD = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w]|\.\d)")
_VERDICT = re.compile(r"(?<![\w.])(1|2|tie)(?![\w]|\.\d)", re.IGNORECASE)
#: Share of the time limit after which missing grades are given up, so that those at hand are kept.
_SHARE = 0.9
_MAX_BYTES = 16 << 20
_PAUSE_S = 0.5


class Judge:
    """Asks a server for grades, and remembers its answers.

    Args:
        options: The options of :class:`~ingle.config.rewards.JudgeReward`, with ``where``, and ``cache``, a file or
            None.

    Raises:
        RewardError: The prompt, the address or the key is missing or invalid.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._template = _read_prompt(options)
        self.compares = "answer_1" in _FIELD.findall(self._template)
        self._server = _Server(options)
        self._memory = _Memory(options["cache"])

    def score(self, answers: Answers, log_extra: Callable[[str, Sequence[Any]], None]) -> list[Any]:
        """Returns a grade from 0 to 1 per answer, None if the judge gave none, or what failed.

        A judge that compares gives each answer its share of wins over the others. Every pair is asked in both orders,
        and counts as a tie if they disagree.
        """
        if self.compares:
            return self._compare(answers)
        texts = self._ask([self._fill(answers, answer=text) for text in answers.completions])
        log_extra("judge", [str(text) for text in texts])
        low, high = self._options["scale"]
        return [text if isinstance(text, Exception) else read_grade(text, low, high) for text in texts]

    def _compare(self, answers: Answers) -> list[Any]:
        count = len(answers)
        pairs = [(i, j) for i, j in permutations(range(count), 2) if answers.completions[i] != answers.completions[j]]
        texts = self._ask(
            [self._fill(answers, answer_1=answers.completions[i], answer_2=answers.completions[j]) for i, j in pairs]
        )
        verdicts = dict(zip(pairs, texts, strict=True))
        wins: list[list[float]] = [[] for _ in range(count)]
        for i in range(count):
            for j in range(count):
                if (
                    i != j
                    and (won := _share_of_win(verdicts.get((i, j), "tie"), verdicts.get((j, i), "tie"))) is not None
                ):
                    wins[i].append(won)
        failure = next((text for text in texts if isinstance(text, Exception)), None)
        return [sum(own) / len(own) if own else failure for own in wins]

    def _fill(self, answers: Answers, **fields: str) -> str:
        known = {**answers.columns, "prompt": _as_text(answers.prompt), **fields}
        return _FIELD.sub(lambda match: str(known.get(match[1], match[0])), self._template)

    def _ask(self, prompts: Sequence[str]) -> list[str | Exception]:
        """Returns the judge's text for each prompt, or what failed."""
        end = time.monotonic() + _SHARE * self._options["time_limit_s"]
        keys = [self._key(prompt) for prompt in prompts]
        known: dict[str, str | Exception] = dict(self._memory.find(keys))
        wanted = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
        with _threads(self._options["num_parallel"]) as threads:
            asked: dict[Future[str], str] = {
                threads.submit(self._server.ask, prompt, end): key for key, prompt in wanted.items()
            }
            with suppress(FutureTimeout):
                for future in as_completed(asked, timeout=max(0.0, end - time.monotonic())):
                    error = future.exception()
                    known[asked[future]] = error if isinstance(error, Exception) else future.result()
                    if error is None:
                        self._memory.keep(asked[future], future.result())
        late = TimeoutError(f"no answer from {self._options['url']} in time")
        return [known.get(key, late) for key in keys]

    def _key(self, prompt: str) -> str:
        content = json.dumps([self._options["url"], self._options["model"], self._options["max_new_tokens"], prompt])
        return hashlib.sha256(content.encode()).hexdigest()


class _Server:
    """One server; sends requests to its address alone, without redirections or proxies."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        url = urlsplit(options["url"])
        if url.scheme not in ("http", "https") or not url.hostname:
            raise RewardError(
                "The address of the judge is not a URL.",
                where=f"{options['where']}.url",
                why=f"it is {options['url']}",
                fix="write it as http://localhost:8000/v1",
            )
        self._host, self._port, self._path = url.hostname, url.port, url.path.rstrip("/") + "/chat/completions"
        self._connection = HTTPSConnection if url.scheme == "https" else HTTPConnection
        self._headers = {"Content-Type": "application/json"}
        if (name := options["api_key_env"]) is not None:
            if not (key := env.secret(name)):
                raise RewardError(
                    "The key for the judge is missing.",
                    where=f"{options['where']}.api_key_env",
                    fix=f"export {name}=KEY",
                )
            self._headers["Authorization"] = f"Bearer {key}"

    def ask(self, prompt: str, end: float) -> str:
        """Returns the answer to a prompt.

        Args:
            prompt: The text of the user's message.
            end: Time, as of ``time.monotonic``, to give up at.

        Raises:
            OSError: The server cannot be reached, refuses the request or takes too long.
            ValueError: Its answer is not that of a chat.
        """
        body = json.dumps(
            {
                "model": self._options["model"],
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": self._options["max_new_tokens"],
            }
        )
        for attempt in range(self._options["retries"] + 1):
            try:
                status, content = self._post(body, end)
            except (OSError, HTTPException) as error:
                failure: Exception = OSError(f"{self._options['url']}: {str(error) or type(error).__name__}")
            else:
                if status == 200:
                    return _content(content)
                failure = OSError(f"{self._options['url']} answered {status}: {content[:200]!r}")
                if status < 500 and status not in (408, 429):
                    break
            if time.monotonic() + _PAUSE_S * 2**attempt >= end:
                break
            time.sleep(_PAUSE_S * 2**attempt)
        raise failure

    def _post(self, body: str, end: float) -> tuple[int, bytes]:
        timeout = end - time.monotonic()
        if timeout <= 0:
            raise TimeoutError("no time is left")
        connection = self._connection(self._host, self._port, timeout=timeout)
        try:
            connection.request("POST", self._path, body, self._headers)
            response = connection.getresponse()
            return response.status, response.read(_MAX_BYTES)
        finally:
            connection.close()


class _Memory:
    """Answers of judges in a file, so that each is asked for once; a file that cannot be used is left alone."""

    def __init__(self, path: str | None) -> None:
        self._connection: sqlite3.Connection | None = None
        if path is not None:
            with suppress(sqlite3.Error):
                self._connection = sqlite3.connect(path, timeout=5)
                self._connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT)")
                self._connection.commit()

    def find(self, keys: Sequence[str]) -> dict[str, str]:
        """Returns the known answers by key."""
        found: dict[str, str] = {}
        if self._connection is not None:
            with suppress(sqlite3.Error):
                for key in keys:
                    row = self._connection.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()
                    if row is not None:
                        found[key] = row[0]
        return found

    def keep(self, key: str, text: str) -> None:
        """Stores an answer."""
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, text))
                self._connection.commit()


def read_grade(text: str, low: float, high: float) -> float | None:
    """Returns the last number of a text that lies on the scale, as a share of the scale; None without one."""
    bare = re.sub(rf"(?:/|\bout of)\s*{high:g}(?:\.0+)?(?![\w]|\.\d)", " ", text)  # "8/10" is an eight
    grades = [grade for match in _NUMBER.findall(bare) if low <= (grade := float(match)) <= high]
    return (grades[-1] - low) / (high - low) if grades else None


def _share_of_win(forward: str | Exception, backward: str | Exception) -> float | None:
    """Returns 1 if the first answer wins in both orders, 0 if it loses in both, else 0.5; None without verdicts."""
    if isinstance(forward, Exception) or isinstance(backward, Exception):
        return None
    first, second = _VERDICT.findall(forward), _VERDICT.findall(backward)
    if not first or not second:
        return None
    return {("1", "2"): 1.0, ("2", "1"): 0.0}.get((first[-1], second[-1]), 0.5)


def _read_prompt(options: Mapping[str, Any]) -> str:
    where = f"{options['where']}.prompt"
    try:
        text = Path(options["prompt"]).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RewardError("The prompt of the judge cannot be read.", where=where, why=str(error)) from None
    fields = set(_FIELD.findall(text))
    if "answer" not in fields and not {"answer_1", "answer_2"} <= fields:
        raise RewardError(
            "The prompt of the judge does not contain the answer.",
            where=where,
            fix="write {answer} where it belongs, or {answer_1} and {answer_2} to compare two",
        )
    return text


def _as_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)


def _content(reply: bytes) -> str:
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f"the judge's answer is not that of a chat: {reply[:200]!r}") from None
    return str(content or "")


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yields threads that are left behind, not waited for, at the end."""
    threads = ThreadPoolExecutor(count)
    try:
        yield threads
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
