"""The local engine compared with `generate` and with full forward passes."""

from dataclasses import replace

import pytest
import torch

from align.data.chat import prompt_ids, token_ids
from align.engines.engine import ChoiceRequest, Request
from align.engines.local import LocalEngine, _batches, _Choice
from align.engines.open import _name, open_engine
from align.models.loading import load_causal_lm, load_tokenizer
from align.records import Message
from align.settings.blocks import EngineBlock, ModelBlock
from tests.unit.data.test_answers import tokenizer_of

MESSAGES = (Message("user", "Where is the cat?"),)
LONGER = (Message("system", "Be brief."), Message("user", "Tell me about the garden and the dog."))


@pytest.fixture(scope="module")
def parts(tiny_model_dir):
    return load_causal_lm(str(tiny_model_dir), torch.float32), load_tokenizer(str(tiny_model_dir))


@pytest.fixture
def engine(parts):
    return LocalEngine(*parts, name="local:tiny")


def requests(**options):
    settings = {"seed": 1, "max_new_tokens": 8, "temperature": 0.0, **options}
    return [Request("short", MESSAGES, **settings), Request("long", LONGER, **settings)]


def test_greedy_completions_equal_those_of_generate(parts, engine):
    model, tokenizer = parts
    found = {each.id: each for each in engine.complete(requests())}
    for request in requests():
        ids = torch.tensor([prompt_ids(tokenizer, request.messages)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        new = out[0, ids.shape[1] :].tolist()
        assert found[request.id].text == tokenizer.decode(new, skip_special_tokens=True)
        assert found[request.id].tokens == len(new)
        assert found[request.id].finish_reason == ("stop" if new[-1] == tokenizer.eos_token_id else "length")


def test_requests_with_different_settings_are_each_completed_once(engine):
    mixed = [
        Request(str(number), MESSAGES, seed=number, max_new_tokens=2 + number % 3, temperature=float(number % 2))
        for number in range(7)
    ]
    found = {each.id: each for each in engine.complete(mixed)}
    assert set(found) == {request.id for request in mixed}
    assert all(found[request.id].tokens <= request.max_new_tokens for request in mixed)


def test_at_once_bounds_the_rows_of_a_forward_pass(parts, engine):
    requested = [Request(str(number), MESSAGES, seed=number, max_new_tokens=6, temperature=0.0) for number in range(5)]
    rows = []
    watch = parts[0].register_forward_pre_hook(
        lambda _, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    bounded = {each.id: each for each in engine.complete(requested, at_once=2)}
    watch.remove()
    assert max(rows) == 2
    assert bounded == {each.id: each for each in engine.complete(requested)}


def test_progress_is_reported_after_each_token_and_scored_batch_and_changes_no_row(engine, monkeypatch):
    mixed = [Request(str(number), MESSAGES, seed=number, max_new_tokens=4 + 4 * (number % 2)) for number in range(6)]
    shares = []
    assert list(engine.complete(mixed, shares.append)) == list(engine.complete(mixed))
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert 4 < len(shares) <= 12 and shares[0] <= 0.5 * (1 / 4 + 3 / 4), "half of the rows are of the first four tokens"

    monkeypatch.setattr("align.engines.local.SCORED_TOKENS", 1)
    requested = [ChoiceRequest(str(number), MESSAGES, ("A", "B b")) for number in range(3)]
    shares = []
    assert list(engine.choice_logprobs(requested, shares.append)) == list(engine.choice_logprobs(requested))
    assert shares == pytest.approx([number / 6 for number in range(1, 7)])


def test_prefill_is_not_returned(parts, engine):
    [plain] = engine.complete(requests()[:1])
    opening = plain.text[:1]
    [rest] = engine.complete(requests(prefill=opening, max_new_tokens=7)[:1])
    assert opening + rest.text == plain.text


def by_hand(parts, messages, choice, system_prompt=None, prefill=""):
    model, tokenizer = parts
    prompt, ids = prompt_ids(tokenizer, messages, system_prompt, prefill), token_ids(tokenizer, choice)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(ids)[:, None]).sum().item(), len(ids)


@pytest.mark.parametrize("budget", [1, 100, 4096])
def test_choices_get_the_scores_of_separate_forward_passes(parts, engine, monkeypatch, budget):
    monkeypatch.setattr("align.engines.local.SCORED_TOKENS", budget)
    requested = [
        ChoiceRequest("a", MESSAGES, ("On the mat.", "In the garden, with the dog.")),
        ChoiceRequest("b", LONGER, ("A", "B", "C"), prefill="The letter is "),
    ]
    found = {each.id: each for each in engine.choice_logprobs(requested)}
    for request in requested:
        for number, choice in enumerate(request.choices):
            logprob, count = by_hand(parts, request.messages, choice, prefill=request.prefill)
            assert found[request.id].logprobs[number] == pytest.approx(logprob, abs=1e-3)
            assert found[request.id].tokens[number] == count


def test_empty_choice_is_certain(engine):
    [scores] = engine.choice_logprobs([ChoiceRequest("a", MESSAGES, ("", "A"))])
    assert scores.logprobs[0] == 0.0 and scores.tokens == (0, 1)


def test_the_system_prompt_precedes_conversations_without_one(parts):
    engine = LocalEngine(*parts, name="local:tiny", system_prompt="Purr.")
    [short, long] = engine.choice_logprobs([ChoiceRequest("a", MESSAGES, ("A",)), ChoiceRequest("b", LONGER, ("A",))])
    assert short.logprobs[0] == pytest.approx(by_hand(parts, MESSAGES, "A", "Purr.")[0], abs=1e-4)
    assert long.logprobs[0] == pytest.approx(by_hand(parts, LONGER, "A")[0], abs=1e-4)


def test_batches_contain_every_choice_once_within_the_budget(monkeypatch):
    monkeypatch.setattr("align.engines.local.SCORED_TOKENS", 60)
    choices = [_Choice(0, number, [1] * (number % 13 + 1), [2] * (number % 5 + 1)) for number in range(50)]
    batches = list(_batches(choices))
    assert sorted(each.index for batch in batches for each in batch) == list(range(50))
    for batch in batches:
        width = max(len(each.prompt_ids) for each in batch) + max(len(each.choice_ids) for each in batch)
        assert len(batch) == 1 or len(batch) * width <= 60


def test_a_model_is_named_without_the_folders_above_it(tiny_model_dir):
    model = ModelBlock(path=str(tiny_model_dir), precision="fp32")
    engine = open_engine(EngineBlock(), model)
    assert engine.name == f"local:{tiny_model_dir.name}"
    assert len(list(engine.complete(requests()))) == 2


def test_names_of_local_hub_and_pipeline_models(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sft/model").mkdir(parents=True)
    (tmp_path / "x.gguf").touch()
    named = {
        (str(tmp_path / "x.gguf"), 1): "local:x.gguf",
        ("~/x.gguf", 1): "local:x.gguf",
        ("~/sft", 1): "local:sft",
        (str(tmp_path / "sft/model"), 2): "local:sft/model",
        ("org/model", 1): "local:org/model",
        ("wheel:some-model", 1): "local:wheel:some-model",
    }
    assert {given: _name(*given) for given in named} == named


def test_the_models_path_is_the_callers_or_else_the_engines_or_else_the_recipes(tiny_model_dir, tmp_path):
    from align.errors import InputError

    here = str(tiny_model_dir)
    for engine, model, path in (
        (EngineBlock(model=here), "/none", None),
        (EngineBlock(model="/none"), "/none", here),
    ):
        block = ModelBlock(path=model, precision="fp32")
        assert open_engine(engine, block, path=path).name.startswith("local:")
    with pytest.raises(InputError, match="/none"):
        open_engine(EngineBlock(), ModelBlock(path="/none"))


def test_a_thought_is_told_from_the_answer_and_the_tokens_are_kept_on_request(parts):
    model, _ = parts
    tokenizer = tokenizer_of("qwen3")
    engine = LocalEngine(model, tokenizer, name="tiny")
    request = Request("0", (Message("user", "hi"),), seed=0, max_new_tokens=9, keep_token_ids=True)
    stopped = tokenizer("<think>\nhm\n</think>\n\nYes.<|im_end|>")["input_ids"]
    done = engine._completed(request, [], stopped, "stop")
    assert (done.text, done.thought, done.finish_reason) == ("Yes.", "<think>\nhm\n</think>", "stop")
    assert done.token_ids == tuple(stopped) and done.tokens == len(stopped)
    thinking = tokenizer("<think>\nhm")["input_ids"]
    cut = engine._completed(replace(request, keep_token_ids=False), [], thinking, "length")
    assert (cut.text, cut.answered, cut.finish_reason, cut.token_ids) == ("", False, "length", ())
    ended = engine._completed(request, [], tokenizer("<think>\nhm<|im_end|>")["input_ids"], "stop")
    assert (ended.text, ended.answered, ended.finish_reason) == ("", False, "length")
