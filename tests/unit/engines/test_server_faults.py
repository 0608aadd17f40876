"""The server engine on a server with fault injection: each request gets a healthy server's answer, exactly once."""

import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from faulty_server import FAULTS, FaultyServer, chat_reply, upper_case

from align.engines import server_faults
from align.engines.complete_all import complete_all
from align.engines.engine import Request
from align.errors import AlignError, InputError
from align.records import Message
from tests.unit.engines.server_engines import CONCURRENCY, engine_of


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch):
    monkeypatch.setattr(server_faults, "INITIAL_DELAY", 0.01)


def requests(count=30):
    return [Request(str(n), (Message("user", f"word {n}"),), seed=n, max_new_tokens=9) for n in range(count)]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_retried_and_every_request_answered_once(fault):
    def slowly(path, body):
        time.sleep(0.02)
        return upper_case(path, body)

    with FaultyServer(slowly, rate=0.5, faults=[fault], delay=2.0) as server:
        done = list(engine_of(server).complete(requests()))

    assert sorted((row.id, row.text) for row in done) == sorted((str(n), f"WORD {n}") for n in range(30))
    assert server.injected[fault] > 5
    assert 1 < server.max_in_flight <= CONCURRENCY and server.max_in_flight_per_request == 1
    assert set(server.answered.values()) == {1}


def test_answers_received_before_the_engine_gave_up_are_not_requested_again(tmp_path: Path):
    hopeless = "word 7"

    def answer(path, body):
        if body["messages"][-1]["content"] == hopeless:
            raise RuntimeError("no answer to this one")
        return chat_reply("fine")

    with FaultyServer(answer) as server, pytest.raises(AlignError, match="cannot be reached, after 1 retries"):
        complete_all(engine_of(server, max_retries=1), requests(12), 12, tmp_path / "j", "test")
    kept = len((tmp_path / "j.0").read_text().splitlines())
    assert kept == sum(server.answered.values()) > 0, "answers received while another request failed are kept too"

    with FaultyServer() as server:
        done = complete_all(engine_of(server), requests(12), 12, tmp_path / "j", "test")
    assert len(done) == 12 and sum(server.tries.values()) == 12 - kept


def test_the_timeout_bounds_a_reply_that_arrives_in_small_pieces():
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


def test_delays_double_up_to_a_maximum_with_jitter_unless_the_server_asks_for_one(monkeypatch):
    import openai

    class Reply:
        status_code, request, headers = 429, None, types.MappingProxyType({"retry-after": "7"})

    monkeypatch.setattr(server_faults, "INITIAL_DELAY", 0.5)
    limited = openai.RateLimitError("busy", response=Reply(), body=None)
    for retry, longest in ((0, 0.5), (1, 1.0), (3, 4.0), (40, server_faults.MAX_DELAY)):
        drawn = {server_faults.retry_delay(retry, TimeoutError()) for _ in range(50)}
        assert longest / 2 <= min(drawn) < max(drawn) <= longest
    assert server_faults.retry_delay(5, limited) == 7.0
    assert server_faults.is_transient(limited)
    Reply.headers = {"retry-after": "0"}
    assert server_faults.retry_delay(3, limited) >= 2.0, "without a delay, all retries would be used up at once"
    Reply.headers = {"retry-after": "86400"}
    assert not server_faults.is_transient(limited), "no retry outlasts a quota of a day"


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_concurrency(monkeypatch, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    shares = []
    with FaultyServer() as server:
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank))
            shares.append(engine_of(server)._slots._value)
        assert sum(shares) == CONCURRENCY
        monkeypatch.setenv("WORLD_SIZE", "4")
        with pytest.raises(InputError, match=r"engine\.concurrency"):
            engine_of(server)


def test_a_small_run_on_a_faulty_server_loses_and_repeats_nothing_when_killed():
    script = Path(__file__).parents[3] / "benchmarks/kill_server_run.py"
    done = subprocess.run(
        [sys.executable, str(script), "--scripted", "--prompts", "40"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
