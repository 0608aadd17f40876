"""A chat completion server with fault injection, for tests and `kill_server_run.py`; it can proxy a real server.

Which tries of a request fail, and how, depends on a seed and the request's content, so that a run is reproducible. The
server counts tries, complete answers and requests in flight. A request whose client has disconnected no longer counts
as in flight.
"""

import hashlib
import json
import random
import select
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("drop", "delay", "garble", "truncate", "empty", "429", "500", "503", "duplicate")
MAX_FAULTS = 3
"""How many tries of one request may fail. A client with at least this many retries always gets an answer."""

Answer = Callable[[str, dict[str, Any]], dict[str, Any]]


def forward_to(base_url: str) -> Answer:
    """Forwards requests to a real server, whose address ends in /v1."""

    def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
        url = base_url.removesuffix("/v1") + path
        request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as reply:
            return dict(json.load(reply))

    return answer


def chat_reply(text: str, reason: str = "stop", logprobs: Any = None, tokens: int = 5) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": logprobs}
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def upper_case(path: str, body: dict[str, Any]) -> dict[str, Any]:
    return chat_reply(body["messages"][-1]["content"].upper())


class FaultyServer(ThreadingHTTPServer):
    """Serves on 127.0.0.1 once it is started.

    Args:
        answer: returns the reply to a path and a body.
        rate: the share of tries that fail, with one of `faults`.
        delay: seconds that a `delay` fault takes; must exceed the client's timeout.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        answer: Answer = upper_case,
        *,
        rate: float = 0.0,
        faults: Sequence[str] = FAULTS,
        delay: float = 5.0,
        seed: int = 0,
        port: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer, self.rate, self.faults, self.delay, self.seed = answer, rate, faults, delay, seed
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(64)
        self.tries: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.in_flight: Counter[str] = Counter()
        self.max_in_flight = self.max_in_flight_per_request = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def start(self) -> "FaultyServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __enter__(self) -> "FaultyServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print no traceback: clients are killed on purpose."""

    def begin(self, key: str) -> str:
        """Count a try and return the fault that it gets, or ''."""
        with self.lock:
            number = self.tries[key]
            self.tries[key] += 1
            self.in_flight[key] += 1
            self.max_in_flight = max(self.max_in_flight, sum(self.in_flight.values()))
            self.max_in_flight_per_request = max(self.max_in_flight_per_request, self.in_flight[key])
            draw = random.Random(f"{self.seed} {key} {number}")
            fault = draw.choice(list(self.faults)) if number < MAX_FAULTS and draw.random() < self.rate else ""
            self.injected[fault or "none"] += 1
            return fault

    def end(self, key: str, is_answered: bool) -> None:
        with self.lock:
            self.in_flight[key] -= 1
            self.answered[key] += is_answered


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        key = hashlib.sha256(content).hexdigest()[:16]
        fault = self.server.begin(key)
        reply = b""
        try:
            reply = self._reply(fault, json.loads(content))
        finally:
            # Count before sending: the client may send its next request as soon as it has the last byte.
            self.server.end(key, bool(reply) and fault in ("", "duplicate"))
        self.close_connection = fault in ("drop", "delay", "truncate") or not reply
        self.wfile.write(reply[: len(reply) // 2] if fault == "truncate" else reply)

    def do_GET(self) -> None:
        self.wfile.write(self._http(200, json.dumps({"object": "list", "data": [{"id": "served"}]}).encode()))

    def _reply(self, fault: str, body: dict[str, Any]) -> bytes:
        """The bytes of the reply; empty to drop the connection."""
        if fault == "drop":
            return b""
        if fault == "delay":
            self._wait_for(None, self.server.delay)
            return b""
        if fault.isdigit():
            return self._http(int(fault), json.dumps({"error": {"message": "injected"}}).encode())
        if fault == "empty":
            return self._http(200, json.dumps({**chat_reply(""), "choices": []}).encode())
        answer: Future[dict[str, Any]] = self.server.pool.submit(self.server.answer, self.path, body)
        if not self._wait_for(answer, 300):
            return b""
        content = json.dumps(answer.result()).encode()
        if fault == "garble":
            return self._http(200, content[::-1])
        return self._http(200, content) * (2 if fault == "duplicate" else 1)

    def _wait_for(self, answer: "Future[dict[str, Any]] | None", seconds: float) -> bool:
        """Whether the answer is there before the client disconnects or the time is over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (answer and answer.done()):
            if select.select([self.connection], [], [], 0.005)[0] and not self._is_connected():
                return False
        return bool(answer and answer.done())

    def _is_connected(self) -> bool:
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _http(self, status: int, content: bytes) -> bytes:
        retry = "retry-after: 0.05\r\n" if status == 429 else ""
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{retry}content-length: {len(content)}\r\n\r\n"
        return head.encode() + content

    def log_message(self, *_: object) -> None:
        pass
