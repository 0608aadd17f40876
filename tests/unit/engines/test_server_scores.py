"""What a server shows of its log-probabilities becomes scores, and what it shows wrongly is refused."""

import math

import pytest
from faulty_server import FaultyServer, chat_reply

from align.engines import server_faults
from align.engines.engine import ChoiceRequest
from align.engines.server_scores import vote_logprobs
from align.errors import AlignError, InputError
from align.records import Message
from tests.unit.engines.server_engines import engine_of


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch):
    monkeypatch.setattr(server_faults, "INITIAL_DELAY", 0.01)


def test_choices_are_voted_on_without_log_probabilities_and_the_engine_says_so():
    said = iter(["(A)", "A", "A.", "B", "I will not say", "A"] * 2)

    def answer(path, body):
        return chat_reply("A" if body["max_tokens"] == 1 else next(said))

    with FaultyServer(answer) as server:
        engine = engine_of(server, votes=6, concurrency=1)
        [scores] = engine.choice_logprobs([ChoiceRequest("q", (Message("user", "A or B?"),), ("A", "B"))])
        assert engine.choice_method == "vote of 6 samples"

    # Four votes for A, one for B, one for neither: 5/6 of (4.5/6, 1.5/6).
    assert [math.exp(value) for value in scores.logprobs] == pytest.approx([5 / 6 * 4.5 / 6, 5 / 6 * 1.5 / 6])


def test_without_a_vote_for_a_choice_each_gets_minus_infinity():
    assert vote_logprobs(["neither", ""], ("A", "B")) == (-math.inf, -math.inf)


def prompt_logprobs(path, body):
    """Like vLLM with one token per word: gives the prompt's log-probabilities if they are requested."""
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


def test_a_reply_that_lacks_log_probabilities_is_requested_again():
    shown = [{"token": letter, "logprob": -1.0} for letter in "AB"]
    scored = {"content": [{"token": "A", "logprob": -1.0, "top_logprobs": shown}]}
    replies = iter([scored, None, scored])
    with FaultyServer(lambda path, body: chat_reply("A", logprobs=next(replies))) as server:
        [scores] = engine_of(server).choice_logprobs([ChoiceRequest("q", (Message("user", "which"),), ("A", "B"))])
    assert scores.logprobs == (-1.0, -1.0) and sum(server.tries.values()) == 3


@pytest.mark.parametrize("given", [[None, None, {"7": {"logprob": -1.0}}], [None, {"7": {"logprob": -1.0}}, {}]])
def test_tokens_without_log_probabilities_are_an_error_and_not_certain(given):
    def answer(path, body):
        return prompt_logprobs(path, body) | ({"prompt_logprobs": given} if "prompt_logprobs" in body else {})

    with (
        FaultyServer(answer) as server,
        pytest.raises(AlignError, match="no log-probability for some token"),
    ):
        engine = engine_of(server, max_retries=0)
        list(engine.choice_logprobs([ChoiceRequest("q", (Message("user", "where"),), ("on the mat",))]))


def test_a_server_whose_scores_of_its_own_text_differ_is_refused():
    with FaultyServer(prompt_logprobs) as server, pytest.raises(InputError, match=r"differ .* by 1\.50 nats per token"):
        engine_of(server).choice_logprobs([ChoiceRequest("q", (Message("user", "where"),), ("on the mat",))])


def test_a_server_that_scores_no_text_says_what_to_use_instead():
    with FaultyServer() as server, pytest.raises(InputError, match=r"does not show .*judge\.kind: choice"):
        engine_of(server).choice_logprobs([ChoiceRequest("q", (Message("user", "where"),), ("on the mat",))])
