"""How large what crosses the wire may be."""

from __future__ import annotations

from typing import Final

MAX_FRAME_BYTES: Final = 64 << 20
MAX_FRAMES: Final = 1026  # prefix, header and 1,024 buffers
MAX_FORK: Final = 4096
MAX_PARTS: Final = 65_536
MAX_CHOICES: Final = 65_536
MAX_TEMPERATURE: Final = 100.0
MAX_STOPS: Final = 64
MAX_LOGIT_BIAS: Final = 4096
MAX_TOP_LOGPROBS: Final = 64
MAX_GRAMMAR_CHARS: Final = 262_144
MAX_TOOLS_CHARS: Final = 1 << 20
MAX_ID: Final = (1 << 63) - 1
MAX_TOKEN_ID: Final = (1 << 31) - 1
