"""The progress bar of a batch: items, generated tokens per second, and what share of the prompts was cached."""

from __future__ import annotations

import time
from typing import Any

from bough.items import ItemUsage


class Progress:
    """A bar on standard error. `num_done` items were done before it began, and count for no speed."""

    def __init__(self, num_items: int, num_done: int) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        self._bar: Any = tqdm(total=num_items, initial=num_done, unit="item")
        self._begun = time.monotonic()
        self._generated = self._cached = self._prompt = self._failed = 0

    def ended(self, usage: ItemUsage, error: BaseException | None) -> None:
        """Show one more item."""
        self._generated += usage.completion_tokens
        self._cached += usage.cached_tokens
        self._prompt += usage.prompt_tokens
        self._failed += error is not None
        seconds = max(time.monotonic() - self._begun, 1e-6)
        figures = {"tok/s": f"{self._generated / seconds:,.0f}", "hits": f"{self._cached / max(self._prompt, 1):.0%}"}
        if self._failed:
            figures["failed"] = str(self._failed)
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the bar as it is. Idempotent."""
        self._bar.close()
