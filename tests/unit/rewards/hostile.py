"""Reward functions that misbehave on answers with a certain word, and score the length of the others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time


def _misbehave(text: str) -> object:
    match text:
        case "raise":
            raise ValueError("no such answer")
        case "exit":
            sys.exit(3)
        case "hang":
            while True:
                time.sleep(0.01)
        case "stubborn":  # catches everything, and gives no time to the interpreter's signal handlers
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            while True:
                time.sleep(0.01)
        case "leave":
            os._exit(0)
        case "segfault":
            ctypes.string_at(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "memory":
            return len(bytearray(2 << 30))
        case "print":
            while True:
                print("x" * 1000)
        case "fork":
            if os.fork() == 0:
                return -1.0
        case "nan":
            return float("nan")
        case "huge":
            return 10**400
        case "text":
            return "1.0"
        case "object":
            return object()
        case "none":
            return None
        case "true":
            return True
        case "close":
            os.closerange(3, 64)
        case "write":
            for descriptor in range(3, 16):
                with contextlib.suppress(OSError):
                    os.write(descriptor, b'\x00\x00\x00\x0f{"outcomes": []}')
        case "threads":
            threading.Thread(target=lambda: 1 / 0, daemon=True).start()
    return float(len(text))


def one(prompt: str, completion: str) -> object:
    return _misbehave(completion)


def many(completions: list[str], **kwargs: object) -> list[object]:
    return [_misbehave(text) for text in completions]


def wrong_length(completions: list[str], **kwargs: object) -> list[float]:
    return [1.0] * (len(completions) - ("short" in completions))


async def later(completions: list[str], **kwargs: object) -> list[float]:
    import asyncio

    await asyncio.sleep(0.001)
    return [float(len(text)) for text in completions]


def lazily(completions: list[str], **kwargs: object) -> object:
    return (float(len(text)) for text in completions)


def graded(data_source, solution_str, ground_truth=None):
    return {"score": 1, "right": solution_str == "7", "note": "text"}
