"""`RuntimeConfig`: every knob of the scheduler and the server, with its unit, default and reason, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from bough.runtime.protocol import RequestError

SCHEDULE_POLICIES = ("lpm", "fcfs")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What a runtime may use and how it orders work.

    token_budget: most tokens one step computes, decode and prefill together; bounds how long a prefill delays decodes.
    max_running: most sequences that hold pages at once.
    schedule_policy: "lpm" admits the longest cached prefix first, with ageing; "fcfs" in order of arrival.
    radix_cache: keep prefixes between operations. speculate: draft what repeats earlier text and verify it in one step;
    None does where a token's bits do not tell how it was computed. overlap: plan a step while a GPU computes the one
    before; not where it speculates, for drafts go on from known tokens, nor with a journal. seed: None draws one at
    start.
    max_waiting: operations queued over all clients before `overloaded`; max_branches, max_sessions: likewise.
    credit: streamed tokens a client may be behind. unsent_bytes: replies kept for a client whose queue is full; beyond
    that it is dropped. heartbeat_s: how often a client pings; one silent for lease_s is dropped with all it holds.
    drain_s: how long SIGTERM waits for running operations. receive_s: most time one loop turn spends on receiving,
    or receive_share of what the step before took, if that is more: requests that came during a long step all join the
    next one.
    """

    token_budget: int = 1024
    max_running: int = 64
    schedule_policy: str = "lpm"
    radix_cache: bool = True
    speculate: bool | None = None
    overlap: bool = True
    seed: int | None = None
    max_waiting: int = 16_384
    max_branches: int = 262_144
    max_sessions: int = 1024
    credit: int = 4096
    unsent_bytes: int = 64 << 20
    heartbeat_s: float = 1.0
    lease_s: float = 15.0
    drain_s: float = 30.0
    receive_s: float = 0.002
    receive_share: float = 0.25

    def __post_init__(self) -> None:
        for name in ("token_budget", "max_running", "max_waiting", "max_branches", "max_sessions", "credit"):
            if getattr(self, name) < 1:
                raise RequestError("invalid_request", f"{name} must be at least 1, got {getattr(self, name)}")
        if self.schedule_policy not in SCHEDULE_POLICIES:
            raise RequestError(
                "invalid_request",
                f"schedule_policy must be one of {', '.join(SCHEDULE_POLICIES)}, got {self.schedule_policy!r}",
            )
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise RequestError("invalid_request", f"seed must be between 0 and 2**63 - 1, got {self.seed}")
