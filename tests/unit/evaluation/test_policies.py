"""Measuring completions in chunks: a sample's token ids, the sums over them, and resuming after a kill."""

import math

import pytest

from align.data.chat import prompt_ids
from align.errors import InputError, NotFinite
from align.evaluation.policies import kl_sums, measure_all, pad_batch, sample_ids
from align.evaluation.report import EvaluatedSample
from align.records import Message


def sample(number: int, token_ids: tuple[int, ...] = (5, 6, 7, 8)) -> EvaluatedSample:
    return EvaluatedSample(
        id=f"ppo/{number}",
        prompt_id=str(number),
        prompt=(Message("user", "cat " * number),),
        category="",
        policy="ppo",
        completion="the cat sat",
        finish_reason="stop",
        tokens=4,
        token_ids=token_ids,
    )


@pytest.fixture(scope="module")
def tokenizer():
    from tests.tiny import build_tokenizer

    return build_tokenizer()


def test_a_completion_is_measured_on_the_tokens_that_the_policy_drew(tokenizer):
    assert sample_ids(tokenizer, sample(1, (9, 9, 9, 0)), None)[1] == [9, 9, 9, 0]


def test_a_completion_whose_tokens_were_not_kept_is_not_guessed_from_its_text(tokenizer):
    with pytest.raises(InputError, match="the tokens of ppo's answer to prompt '1' were not kept"):
        sample_ids(tokenizer, sample(1, ()), None)


def test_the_prompt_includes_the_recipes_system_prompt(tokenizer):
    before, _ = sample_ids(tokenizer, sample(1), "Be kind.")
    assert before == prompt_ids(tokenizer, (Message("system", "Be kind."), *sample(1).prompt))


def test_prompts_end_and_completions_begin_in_one_column():
    import torch

    input_ids, mask, length = pad_batch([([1, 2, 3], [4]), ([5], [6, 7])], 0, torch.device("cpu"))
    assert input_ids.tolist() == [[1, 2, 3, 4, 0], [0, 0, 5, 6, 7]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert length == 2


def test_a_chunk_of_empty_completions_still_has_a_column():
    import torch

    input_ids, mask, length = pad_batch([([1, 2], [])], 0, torch.device("cpu"))
    assert (input_ids.tolist(), mask.tolist(), length) == ([[1, 2, 0]], [[1, 1, 0]], 1)


def test_divergence_estimators_worked_by_hand():
    k1, k3 = kl_sums([math.log(0.5), math.log(0.4)], [math.log(0.25), math.log(0.8)])
    assert k1 == pytest.approx(math.log(2) - math.log(2))
    assert k3 == pytest.approx((0.5 - 1 + math.log(2)) + (2 - 1 - math.log(2)))


def test_estimators_of_an_empty_completion_are_zero():
    assert kl_sums([], []) == (0.0, 0.0)


def test_measured_samples_are_not_measured_again_and_no_model_is_loaded_for_them(tmp_path):
    samples = [sample(number) for number in range(1, 8)]
    batches = []

    def measure(chunk):
        batches.append([each.prompt_id for each in chunk])
        return [len(each.prompt[0].content) for each in chunk]

    found = measure_all(samples, lambda: measure, 3, tmp_path / "lengths.journal", "lengths")
    assert found == {f"ppo/{number}": 4 * number for number in range(1, 8)}
    assert batches == [["7", "6", "5"], ["4", "3", "2"], ["1"]]
    again = measure_all(samples, lambda: pytest.fail("loaded"), 3, tmp_path / "lengths.journal", "lengths")
    assert again == found


@pytest.mark.parametrize("broken", [math.nan, [0.0, math.inf]])
def test_a_number_that_is_not_finite_is_never_kept(tmp_path, broken):
    samples = [sample(number) for number in range(1, 4)]
    path = tmp_path / "scores.journal"
    with pytest.raises(NotFinite, match="a value measured on ppo's answer to prompt '3' is not finite"):
        measure_all(samples, lambda: lambda chunk: [broken for _ in chunk], 1, path, "scores")
    assert measure_all(samples, lambda: lambda chunk: [1.0 for _ in chunk], 1, path, "scores") == {
        each.id: 1.0 for each in samples
    }


def test_a_chunk_that_a_kill_interrupted_is_measured_again_as_a_whole(tmp_path):
    samples = [sample(number) for number in range(1, 7)]
    path = tmp_path / "values.journal"
    measure_all(samples, lambda: lambda chunk: [each.prompt_id for each in chunk], 3, path, "values")
    own = tmp_path / "values.journal.0"
    own.write_text("".join(own.read_text().splitlines(keepends=True)[:4]) + '{"id": "ppo/2", "val')
    sizes = []
    again = measure_all(
        samples, lambda: lambda chunk: sizes.append(len(chunk)) or [each.prompt_id for each in chunk], 3, path, "values"
    )
    assert again == {each.id: each.prompt_id for each in samples}
    assert sizes == [3]
    assert len(own.read_text().splitlines()) == 6
