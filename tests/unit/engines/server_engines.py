"""The server engine as the tests of this folder set it up: quick to give up, with few requests in flight."""

from typing import Any

from faulty_server import FaultyServer

from align.engines.openai_server import OpenAIEngine
from align.settings.blocks import EngineBlock

CONCURRENCY = 3


def engine_of(server: FaultyServer, **changes: Any) -> OpenAIEngine:
    settings = {"concurrency": CONCURRENCY, "timeout_seconds": 0.3, "max_retries": 4, **changes}
    return OpenAIEngine(EngineBlock(kind="openai", model="m", base_url=server.base_url, **settings))
