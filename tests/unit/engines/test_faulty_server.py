"""The server engine before a server that fails on purpose: the answers are those of a healthy one, each once."""

import math
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from faulty_server import FAULTS, FaultyServer, chat_reply, upper_case

from align.engines import server_faults
from align.engines.complete_all import complete_all
from align.engines.engine import ChoiceRequest, Request
from align.engines.openai_server import OpenAIEngine
from align.engines.server_scores import vote_logprobs
from align.errors import AlignError, InputError
from align.records import Message
from align.settings.blocks import EngineBlock

BOUND = 3


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(server_faults, "INITIAL_DELAY", 0.01)


def engine_of(server, **changes):
    settings = {"concurrency": BOUND, "timeout_seconds": 0.3, "max_retries": 4, **changes}
    return OpenAIEngine(EngineBlock(kind="openai", model="m", base_url=server.base_url, **settings))


def requests(count=30):
    return [Request(str(n), (Message("user", f"word {n}"),), seed=n, max_new_tokens=9) for n in range(count)]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_outlasted_and_every_request_answered_once(fault):
    def slowly(path, body):
        time.sleep(0.02)
        return upper_case(path, body)

    with FaultyServer(slowly, rate=0.5, faults=[fault], delay=2.0) as server:
        done = list(engine_of(server).complete(requests()))

    assert sorted((row.id, row.text) for row in done) == sorted((str(n), f"WORD {n}") for n in range(30))
    assert server.injected[fault] > 5
    assert 1 < server.max_in_flight <= BOUND and server.max_in_flight_per_request == 1
    assert set(server.answered.values()) == {1}


def test_what_was_finished_before_an_engine_gave_up_is_not_asked_for_again(tmp_path: Path):
    hopeless = "word 7"

    def answer(path, body):
        if body["messages"][-1]["content"] == hopeless:
            raise RuntimeError("no answer to this one")
        return chat_reply("fine")

    with FaultyServer(answer) as server, pytest.raises(AlignError, match="cannot be reached, after 1 retries"):
        complete_all(engine_of(server, max_retries=1), requests(12), 12, tmp_path / "j", "test")
    kept = len((tmp_path / "j.0").read_text().splitlines())
    assert kept == sum(server.answered.values()) > 0, "what was answered while one was failing is kept too"

    with FaultyServer() as server:
        done = complete_all(engine_of(server), requests(12), 12, tmp_path / "j", "test")
    assert len(done) == 12 and sum(server.tries.values()) == 12 - kept


def test_a_reply_that_drips_in_takes_no_longer_than_the_timeout():
    import socketserver
    import threading

    class Drip(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(65536)
            self.request.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
            for _ in range(100):
                time.sleep(0.05)
                try:
                    self.request.sendall(b" ")
                except OSError:
                    return

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drip) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        server.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        start = time.monotonic()
        with pytest.raises(AlignError, match=r"no answer in 0\.3 seconds"):
            list(engine_of(server, max_retries=0).complete(requests(1)))
        assert time.monotonic() - start < 2
        server.shutdown()


def test_pauses_double_up_to_a_bound_with_jitter_and_a_server_may_name_its_own(monkeypatch):
    import openai

    class Reply:
        status_code, request, headers = 429, None, types.MappingProxyType({"retry-after": "7"})

    monkeypatch.setattr(server_faults, "INITIAL_DELAY", 0.5)
    limited = openai.RateLimitError("busy", response=Reply(), body=None)
    for tried, longest in ((0, 0.5), (1, 1.0), (3, 4.0), (40, server_faults.MAX_DELAY)):
        drawn = {server_faults.retry_delay(tried, TimeoutError()) for _ in range(50)}
        assert longest / 2 <= min(drawn) < max(drawn) <= longest
    assert server_faults.retry_delay(5, limited) == 7.0
    assert server_faults.is_transient(limited)
    Reply.headers = {"retry-after": "0"}
    assert server_faults.retry_delay(3, limited) >= 2.0, "no pause at all would spend every retry at once"
    Reply.headers = {"retry-after": "86400"}
    assert not server_faults.is_transient(limited), "a day's quota is not waited for"


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_bound(monkeypatch, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    shares = []
    with FaultyServer() as server:
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank))
            shares.append(engine_of(server)._slots._value)
        assert sum(shares) == BOUND
        monkeypatch.setenv("WORLD_SIZE", "4")
        with pytest.raises(InputError, match=r"engine\.concurrency"):
            engine_of(server)


def test_votes_decide_where_there_are_no_log_probabilities_and_the_engine_says_so():
    said = iter(["(A)", "A", "A.", "B", "I will not say", "A"] * 2)

    def answer(path, body):
        return chat_reply("A" if body["max_tokens"] == 1 else next(said))

    with FaultyServer(answer) as server:
        engine = engine_of(server, votes=6, concurrency=1)
        [scores] = engine.choice_logprobs([ChoiceRequest("q", (Message("user", "A or B?"),), ("A", "B"))])
        assert engine.choice_method == "vote of 6 samples"

    # Four votes for A, one for B, one for neither: 5/6 of (4.5/6, 1.5/6).
    assert [math.exp(value) for value in scores.logprobs] == pytest.approx([5 / 6 * 4.5 / 6, 5 / 6 * 1.5 / 6])


def test_votes_for_nothing_leave_nothing():
    assert vote_logprobs(["neither", ""], ("A", "B")) == (-math.inf, -math.inf)


def prompt_logprobs(path, body):
    """Like vLLM: a token for each word, and log-probabilities of the given ones where they are asked for."""
    words = " ".join(message["content"] for message in body["messages"]).split()
    alternatives = [{"token": "x", "logprob": -0.5}, {"token": "y", "logprob": -1.0}]
    shown = [{"token": "x", "logprob": -0.5, "top_logprobs": alternatives}] * 2
    reply = chat_reply("xx", logprobs={"content": shown} if body.get("logprobs") else None)
    reply["usage"]["prompt_tokens"] = len(words)
    if "prompt_logprobs" in body:
        given = [{str(n): {"logprob": -float(len(word)), "rank": 1}} for n, word in enumerate(words[1:])]
        reply["prompt_logprobs"] = [None, *given]
    return reply


def test_texts_are_scored_by_the_log_probabilities_of_the_prompts_tokens(monkeypatch):
    with FaultyServer(prompt_logprobs) as server:
        engine = engine_of(server)
        monkeypatch.setattr("align.engines.server_scores.MAX_DIFFERENCE", 10)
        asked = ChoiceRequest("q", (Message("user", "where is it"),), ("on the mat", "in a box there"))
        [scores] = engine.choice_logprobs([asked])

    assert scores.logprobs == (-8.0, -11.0) and scores.tokens == (3, 4)


def test_a_letter_without_log_probabilities_is_asked_for_again():
    shown = [{"token": letter, "logprob": -1.0} for letter in "AB"]
    scored = {"content": [{"token": "A", "logprob": -1.0, "top_logprobs": shown}]}
    replies = iter([scored, None, scored])
    with FaultyServer(lambda path, body: chat_reply("A", logprobs=next(replies))) as server:
        [scores] = engine_of(server).choice_logprobs([ChoiceRequest("q", (Message("user", "which"),), ("A", "B"))])
    assert scores.logprobs == (-1.0, -1.0) and sum(server.tries.values()) == 3


@pytest.mark.parametrize("given", [[None, None, {"7": {"logprob": -1.0}}], [None, {"7": {"logprob": -1.0}}, {}]])
def test_a_text_whose_tokens_have_no_log_probabilities_is_not_taken_for_certain(given):
    def answer(path, body):
        return prompt_logprobs(path, body) | ({"prompt_logprobs": given} if "prompt_logprobs" in body else {})

    with (
        FaultyServer(answer) as server,
        pytest.raises(AlignError, match="no log-probability for some token"),
    ):
        engine = engine_of(server, max_retries=0)
        list(engine.choice_logprobs([ChoiceRequest("q", (Message("user", "where"),), ("on the mat",))]))


def test_a_server_that_contradicts_itself_about_a_text_is_not_believed():
    with FaultyServer(prompt_logprobs) as server, pytest.raises(InputError, match=r"differ .* by 1\.50 nats per token"):
        engine_of(server).choice_logprobs([ChoiceRequest("q", (Message("user", "where"),), ("on the mat",))])


def test_a_server_that_scores_no_text_says_what_to_use_instead():
    with FaultyServer() as server, pytest.raises(InputError, match=r"does not show .*judge\.kind: choice"):
        engine_of(server).choice_logprobs([ChoiceRequest("q", (Message("user", "where"),), ("on the mat",))])


def test_a_small_run_killed_before_a_failing_server_loses_and_repeats_nothing():
    script = Path(__file__).parents[3] / "benchmarks/kill_server_run.py"
    done = subprocess.run(
        [sys.executable, str(script), "--scripted", "--prompts", "40"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
