"""A backend whose generates continue the constants' own tokens, as transformers' `generate` does."""

from __future__ import annotations

from typing import Any


class Unhealed:
    """Everything is the given backend's, but no generate heals the tokens before it."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def generate(self, *args: Any, **options: Any) -> Any:
        return self._backend.generate(*args, **{**options, "heal": False})
