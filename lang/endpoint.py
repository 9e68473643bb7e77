"""`RuntimeEndpoint`: SGLang's name for a connection to a runtime that somebody else started."""

from __future__ import annotations

from typing import Any

from bough.client import RuntimeClient
from bough.spellings import endpoint_address


class RuntimeEndpoint(RuntimeClient):
    """A `RuntimeClient` by SGLang's name.

    ::

        bo.set_default_backend(bo.RuntimeEndpoint("ipc:///run/user/1000/bough/s"))

    base_url: `ipc://` or `tcp://`. options are RuntimeClient's. Raises InvalidRequest for an http address (that is
    what `bough.OpenAI` is for) and for SGLang's api_key, verify and chat_template_name, which have no meaning here.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: str | None = None,
        chat_template_name: str | None = None,
        **options: Any,
    ) -> None:
        unused = (("api_key", api_key), ("verify", verify), ("chat_template_name", chat_template_name))
        super().__init__(endpoint_address(base_url, unused), **options)
