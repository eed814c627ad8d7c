"""The arithmetic that decides speed: each fast kernel is tested against a readable reference and falls back to it."""
