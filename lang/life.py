"""One life of a runtime of our own: its process, and the link to it."""

from __future__ import annotations

import time
from typing import Final

from bough.link import Link
from bough.process import RuntimeProcess
from bough.runtime.protocol import Welcome

SILENCE_S: Final = 60.0
"""How long this process's own runtime may be silent. Its death is seen at once; a long step of a large model is not."""


class RuntimeLife:
    """A process that was started and a link to it, to be `start`ed once; `end` is idempotent, and ends a start too."""

    def __init__(self, model: str, options: list[str], timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s
        self.process = RuntimeProcess(model, options)
        self.link = Link(self.process.address, silence_s=SILENCE_S, watch=self.process.reason_of_death)

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def start(self) -> Welcome:
        """Wait until the runtime serves, and connect. Raises why that cannot be; `end` it then."""
        self.process.wait_until_ready(self._deadline)
        return self.link.start(max(1.0, self._deadline - time.monotonic()))

    def end(self) -> None:
        """Disconnect, and stop the process."""
        self.link.stop()
        self.process.stop()
