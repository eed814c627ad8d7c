"""The arithmetic that decides speed: each fast kernel is tested against a readable reference and falls back to it."""

#: The target of a position that carries no loss.
IGNORE_INDEX = -100
