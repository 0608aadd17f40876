"""The scripted engine keeps the contract of an engine."""

import pytest
from scripted_engine import ScriptedEngine

from align.engines.engine import ChoiceRequest, Request
from align.errors import InputError
from align.records import Message

MESSAGES = (Message("user", "three words please"),)


def test_text_is_a_function_of_the_request():
    engine = ScriptedEngine(lambda request: request.messages[-1].content.upper())
    [done] = engine.complete([Request("a", MESSAGES, seed=0, max_new_tokens=9)])
    assert (done.text, done.finish_reason, done.tokens) == ("THREE WORDS PLEASE", "stop", 4)
    assert engine.completed == 1


def test_a_long_text_is_truncated_at_the_limit():
    engine = ScriptedEngine(lambda request: "one two three")
    [done] = engine.complete([Request("a", MESSAGES, seed=0, max_new_tokens=3)])
    assert (done.text, done.finish_reason, done.tokens) == ("one two three", "length", 3)
    [done] = engine.complete([Request("a", MESSAGES, seed=0, max_new_tokens=2)])
    assert (done.text, done.tokens) == ("one two", 2)


def test_choices_are_scored_one_by_one():
    engine = ScriptedEngine(lambda request: "", lambda request, choice: -float(len(choice)))
    [scores] = engine.choice_logprobs([ChoiceRequest("a", MESSAGES, ("xy", "x y z"))])
    assert scores.logprobs == (-2.0, -5.0) and scores.tokens == (1, 3)


def test_without_a_scoring_function_choices_are_an_error():
    with pytest.raises(InputError, match="log-probabilities"):
        list(ScriptedEngine(lambda request: "").choice_logprobs([ChoiceRequest("a", MESSAGES, ("x",))]))
