"""The server engine on a local test server."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from align.engines.engine import ChoiceRequest, Request
from align.engines.open import open_engine
from align.engines.openai_server import OpenAIEngine
from align.errors import AlignError, InputError
from align.records import Message
from align.settings.blocks import EngineBlock, ModelBlock

MESSAGES = (Message("user", "Where is the cat?"),)
KEY = "sk-secret-of-the-test"


class Server(ThreadingHTTPServer):
    """Answers chat requests by `answer(body) -> (status, body)`, and keeps the requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = lambda body: (200, chat(body["messages"][-1]["content"].upper()))
        self.bodies = []
        self.keys = []
        self.together = self.most_together = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers["authorization"])
            server.together += 1
            server.most_together = max(server.most_together, server.together)
        status, answer = server.answer(body)
        with server.lock:
            server.together -= 1
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        if status == 429:
            self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def chat(text, reason="stop", logprobs=None, tokens=5):
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": logprobs}
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


@pytest.fixture
def server():
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def engine(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    return EngineBlock(
        kind="openai",
        model="served",
        base_url=f"http://127.0.0.1:{server.server_port}/v1",
        api_key_env="TEST_KEY",
        max_retries=1,
        concurrency=3,
        timeout_seconds=5,
    )


def request(number=0, **options):
    return Request(str(number), MESSAGES, **{"seed": 7, "max_new_tokens": 9, **options})


def test_a_completion_request_carries_the_sampling_settings(server, engine):
    [done] = OpenAIEngine(engine).complete([request(temperature=0.5, top_p=0.9)])
    assert (done.id, done.text, done.finish_reason, done.tokens) == ("0", "WHERE IS THE CAT?", "stop", 5)
    [body] = server.bodies
    assert body["messages"] == [{"role": "user", "content": "Where is the cat?"}]
    expected = {"model": "served", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 7}
    assert {name: body[name] for name in expected} == expected
    assert server.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_is_told_from_the_answer_whether_or_not_the_server_does_it(server, engine, name):
    def answer(text, thought=None, reason="stop"):
        reply = chat(text, reason)
        reply["choices"][0]["message"][name] = thought
        server.answer = lambda body: (200, reply)
        [done] = OpenAIEngine(engine).complete([request()])
        return done.text, done.thought, done.finish_reason, done.answered

    assert answer("Yes.", "hm") == ("Yes.", "hm", "stop", True)
    assert answer("<think>\nhm\n</think>\n\nYes.") == ("Yes.", "<think>\nhm\n</think>", "stop", True)
    assert answer(None, "hm", "length") == ("", "hm", "length", False)
    assert answer("<think>\nhm", None, "length") == ("", "<think>\nhm", "length", False)
    assert answer("Yes.", {"another": "form"}) == ("Yes.", "", "stop", True)


@pytest.mark.parametrize(("reason", "expected"), [("stop", "stop"), ("length", "length"), ("content_filter", "length")])
def test_any_finish_reason_but_stop_means_truncated(server, engine, reason, expected):
    server.answer = lambda body: (200, chat("x", reason))
    [done] = OpenAIEngine(engine).complete([request()])
    assert done.finish_reason == expected


def test_requests_run_concurrently_up_to_the_limit_and_each_once(server, engine):
    def slowly(body):
        time.sleep(0.03)
        return 200, chat("x")

    server.answer = slowly
    found = [done.id for done in OpenAIEngine(engine).complete([request(number) for number in range(12)])]
    assert sorted(found, key=int) == [str(number) for number in range(12)]
    assert len(server.bodies) == 12
    assert 1 < server.most_together <= 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_transient_error_is_retried(server, engine, monkeypatch, status):
    monkeypatch.setattr("align.engines.server_faults.INITIAL_DELAY", 0.01)
    answers = iter([(status, {"error": {"message": "busy"}}), (200, chat("fine"))])
    server.answer = lambda body: next(answers)
    [done] = OpenAIEngine(engine).complete([request()])
    assert done.text == "fine" and len(server.bodies) == 2


def test_a_lasting_server_error_has_exit_code_1_and_does_not_show_the_key(server, engine, monkeypatch):
    monkeypatch.setattr("align.engines.server_faults.INITIAL_DELAY", 0.01)
    server.answer = lambda body: (500, {"error": {"message": f"broken for {KEY}"}})
    with pytest.raises(AlignError, match="run the same command again") as caught:
        list(OpenAIEngine(engine).complete([request()]))
    assert caught.value.exit_code == 1
    assert KEY not in str(caught.value)
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("status", "said"), [(401, "TEST_KEY"), (404, r"engine\.model"), (400, "refused the request: .*too long")]
)
def test_errors_that_the_user_can_fix_name_the_remedy_and_are_not_retried(server, engine, status, said):
    server.answer = lambda body: (status, {"error": {"message": f"{KEY} too long"}})
    with pytest.raises(InputError, match=said) as caught:
        list(OpenAIEngine(engine).complete([request()]))
    assert KEY not in str(caught.value)
    assert len(server.bodies) == 1


def test_an_unreachable_server_is_an_error(engine, monkeypatch):
    monkeypatch.setattr("align.engines.server_faults.INITIAL_DELAY", 0.01)
    away = engine.model_copy(update={"base_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(InputError, match=r"cannot be reached.*engine\.base_url"):
        list(OpenAIEngine(away).complete([request()]))


def test_a_server_that_does_not_answer_in_time_is_an_error(server, engine, monkeypatch):
    server.answer = lambda body: (time.sleep(0.3), (200, chat("late")))[1]
    hurried = engine.model_copy(update={"timeout_seconds": 0.05, "max_retries": 0})
    with pytest.raises(AlignError, match=r"no answer in 0\.05 seconds"):
        list(OpenAIEngine(hurried).complete([request()]))


def test_letters_are_scored_by_the_alternatives_for_one_token(server, engine):
    top = [("A", 0.5), (" A", 0.1), ("B", 0.3), ("Z", 0.05)]
    content = [{"token": "A", "logprob": -1, "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in top]}]
    server.answer = lambda body: (200, chat("A", "length", {"content": content}))
    [scores] = OpenAIEngine(engine).choice_logprobs([ChoiceRequest("q", MESSAGES, ("A", "B", "C"))])
    assert scores.logprobs[:2] == pytest.approx((math.log(0.6), math.log(0.3)))
    assert scores.logprobs[2] == pytest.approx(math.log(0.05)), "the upper bound of a hidden letter"
    assert scores.tokens == (1, 1, 1)
    assert server.bodies[0]["max_tokens"] == 1 and server.bodies[0]["top_logprobs"] == 20
    assert server.bodies[1]["top_logprobs"] == 4, "as many as the server was found to show"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ({"A": 0.5, "Z": 0.4}, (0.5, 0.05, 0.05)),  # two share the remaining 0.1
        ({"A": 0.02, "Z": 0.01}, (0.02, 0.01, 0.01)),  # no likelier than the least likely one shown
        ({"A": 0.75, "Z": 0.25}, (0.75, 0.0, 0.0)),  # no mass remains
        ({"Y": 0.5, "Z": 0.1}, (0.0, 0.0, 0.0)),  # no letter at all: the judge answered something else
    ],
)
def test_a_hidden_letter_gets_the_upper_bound_of_its_probability(server, engine, shown, expected):
    top = [{"token": token, "logprob": math.log(p)} for token, p in shown.items()]
    content = [{"token": "A", "logprob": -1, "top_logprobs": top}]
    server.answer = lambda body: (200, chat("A", "length", {"content": content}))
    [scores] = OpenAIEngine(engine).choice_logprobs([ChoiceRequest("q", MESSAGES, ("A", "B", "C"))])
    assert [math.exp(logprob) for logprob in scores.logprobs] == pytest.approx(expected)


def test_prefill_is_sent_as_an_unfinished_turn_and_not_returned(server, engine):
    server.answer = lambda body: (200, chat("The letter is A"))
    [done] = OpenAIEngine(engine).complete([request(prefill="The letter is ")])
    assert done.text == "A"
    assert server.bodies[0]["messages"][-1] == {"role": "assistant", "content": "The letter is "}
    assert server.bodies[0]["continue_final_message"] is True


def test_the_system_prompt_comes_first(server, engine):
    engine = open_engine(engine, ModelBlock(path="unused", system_prompt="Purr."))
    assert engine.name == "openai:served"
    list(engine.complete([request()]))
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": "Purr."}


def test_a_self_hosted_server_needs_no_key(server, engine, monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    assert [done.text for done in OpenAIEngine(engine).complete([request()])] == ["WHERE IS THE CAT?"]


def test_openai_itself_needs_a_key(engine, monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(InputError, match="TEST_KEY is not set"):
        OpenAIEngine(engine.model_copy(update={"base_url": None}))


def test_a_server_needs_the_models_name(engine):
    with pytest.raises(InputError, match=r"engine\.model"):
        OpenAIEngine(engine.model_copy(update={"model": None}))


REFUSALS = [
    (400, {"code": "content_filter", "message": "The response was filtered"}),
    (400, {"code": 400, "message": "This model's maximum context length is 4096 tokens. However, you requested 5000"}),
    (400, {"type": "exceed_context_size_error", "message": "the request exceeds the available context size"}),
    (413, {"message": "Payload too large"}),
    (422, {"message": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. Given: 3000"}),
    (403, {"message": "Your chosen model requires moderation and your input was flagged"}),
]


@pytest.mark.parametrize(("status", "error"), REFUSALS)
def test_a_prompt_that_the_server_refuses_is_marked_and_the_others_are_answered(server, engine, status, error):
    def answer(body):
        return (status, {"error": error}) if body["seed"] == 2 else (200, chat("Here."))

    server.answer = answer
    requests = [request(number, seed=number) for number in range(5)]
    done = {each.id: each for each in OpenAIEngine(engine).complete(requests)}
    assert [done[str(number)].text for number in range(5)] == ["Here.", "Here.", "", "Here.", "Here."]
    assert error["message"] in done["2"].refused
    assert (done["2"].finish_reason, done["2"].answered) == ("length", False)
    assert not any(each.refused for key, each in done.items() if key != "2")


def test_a_server_that_refuses_everything_ends_the_run_before_any_refusal_is_kept(server, engine):
    server.answer = lambda body: (400, {"error": {"code": "context_length_exceeded", "message": "too long"}})
    given = []
    with pytest.raises(InputError, match=r"refused all 8 requests.*too long"):
        given.extend(OpenAIEngine(engine).complete([request(number) for number in range(8)]))
    assert given == []


def test_a_request_that_no_server_would_accept_still_ends_the_run(server, engine):
    server.answer = lambda body: (400, {"error": {"message": "Unsupported parameter: 'seed'"}})
    with pytest.raises(InputError, match="Unsupported parameter"):
        list(OpenAIEngine(engine).complete([request()]))


def test_a_refused_choice_has_no_probability_so_that_a_judge_abstains(server, engine):
    shown = [{"token": "A", "logprob": -0.1}, {"token": "B", "logprob": -2.4}]
    letters = {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": shown}]}

    def answer(body):
        refused = "bomb" in body["messages"][-1]["content"]
        if refused:
            return 400, {"error": {"code": "content_filter", "message": "no"}}
        return 200, chat("A", logprobs=letters)

    server.answer = answer
    asked = [ChoiceRequest(text, (Message("user", text),), ("A", "B")) for text in ("a cat", "a bomb")]
    found = {each.id: each for each in OpenAIEngine(engine).choice_logprobs(asked)}
    assert found["a cat"].logprobs == (-0.1, -2.4)
    assert found["a bomb"].logprobs == (-math.inf, -math.inf)
    assert found["a bomb"].refused
