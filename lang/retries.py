"""Which failures of a batch's item are worth another try, how many, and how long to wait before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bough.errors import InvalidRequest, Overloaded, RuntimeLost, Timeout


@dataclass(frozen=True, kw_only=True)
class Retries:
    """A policy: an item whose program ends with one of the errors `on` is run again, from its beginning.

    ::

        answer.run_batch(items, retries=bo.Retries(times=5, on=(bo.Overloaded, TimeoutError)))

    times: most further tries of an item. on: exception classes; also a program's own may be among them. The wait before
    try n is `backoff_s` doubled n - 1 times, at most `max_backoff_s`, times a random share between a half and one, so
    that many items do not come back at once; it is never less than the `retry_after_s` that an error's details name.
    """

    times: int = 3
    on: tuple[type[BaseException], ...] = (Overloaded, RuntimeLost, Timeout)
    backoff_s: float = 0.5
    max_backoff_s: float = 30.0

    def __post_init__(self) -> None:
        if not isinstance(self.times, int) or isinstance(self.times, bool) or self.times < 0:
            raise InvalidRequest(f"times must be a whole number of at least 0, got {self.times!r}", field="times")
        is_tuple = isinstance(self.on, tuple)
        if not is_tuple or not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in self.on):
            raise InvalidRequest(f"on must be a tuple of exception classes, got {self.on!r}", field="on")
        for name in ("backoff_s", "max_backoff_s"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise InvalidRequest(f"{name} must be a number of seconds, got {value!r}", field=name)

    def wait_s(self, error: BaseException, num_attempts: int) -> float | None:
        """Return how long to wait before an item is tried again that failed `num_attempts` times, or None: no more."""
        if num_attempts > self.times or not isinstance(error, self.on):
            return None
        import random  # 5 ms that a program without failures need not pay

        backoff_s = min(self.max_backoff_s, self.backoff_s * 2.0 ** min(num_attempts - 1, 60))
        hint = getattr(error, "details", {}).get("retry_after_s")
        at_least = float(hint) if isinstance(hint, (int, float)) else 0.0
        return max(at_least, backoff_s * random.uniform(0.5, 1.0))


def retries_from(given: Retries | int) -> Retries:
    """Return the policy; a number stands for so many tries of the default one."""
    if isinstance(given, Retries):
        return given
    if not isinstance(given, int) or isinstance(given, bool) or given < 0:
        raise InvalidRequest(f"retries must be bo.Retries(...) or at least 0, got {given!r}", field="retries")
    return Retries(times=given)
