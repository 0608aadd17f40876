"""The evaluate stage on tiny random models, its figures recomputed by other means."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from align.constitution.loading import load_constitution
from align.data.chat import prompt_ids
from align.engines.provenance import read_provenance
from align.errors import InputError
from align.evaluation.report import CANDIDATES, EvaluatedSample, Report, read_report, read_samples
from align.records import Message, Prompt, read_rows, write_rows
from align.run.artefacts import Journal, file_digest
from align.run.reproducibility import derive_seed
from align.run.stage import Context
from align.settings.blocks import JudgeBlock, ModelBlock, TrackingBlock
from align.stages.evaluate import STAGE
from tests.tiny import build_tiny_model

CONSTITUTION = """
title: Letters
principles:
  - id: has-e
    text: Use the letter e.
    opposite: Never use the letter e.
    rule: {contains: e}
    probes: [{prompt: Hi., better: hello, worse: who}]
  - id: no-q
    text: Never use the letter q.
    rule: {excludes: q}
    applies: [odd]
"""
TEMPERATURE = 0.8
BEST_OF = 3
BEST = f"best-of-{BEST_OF}"
SETTINGS = {
    "policies": ["base", "sft", "ppo"],
    "best_of": BEST_OF,
    "sampling": {"max_new_tokens": 12, "batch_size": 4, "temperature": TEMPERATURE},
    "bootstrap": 200,
}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory, tiny_model_dir, tiny_reward_dir) -> dict[str, Path]:
    """Published folders: `sft` is the base model itself, `ppo` another model."""
    run = tmp_path_factory.mktemp("run")
    for stage, model in (("sft", tiny_model_dir), ("reward", tiny_reward_dir)):
        shutil.copytree(model, run / stage / "model")
    build_tiny_model(run / "ppo" / "model", seed=5)
    prompts = [
        Prompt(f"p{n}", (Message("user", f"Where is cat {n}?"),), "eval" if n < 9 else "rl", ("odd", "even")[n % 2])
        for n in range(12)
    ]
    (run / "sample").mkdir()
    write_rows(run / "sample" / "prompts.jsonl", prompts)
    return {stage: run / stage for stage in ("sample", "sft", "reward", "ppo")}


@pytest.fixture(scope="module")
def constitution(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("constitutions") / "letters.yaml"
    path.write_text(CONSTITUTION)
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, upstream, tiny_model_dir, constitution) -> Path:
    output = tmp_path_factory.mktemp("evaluated")
    STAGE.run(context(output, upstream, tiny_model_dir, constitution))
    return output


def context(
    output: Path,
    upstream: Mapping[str, Path],
    model: Path,
    constitution: Path | None,
    judge: str = "rule",
    **changes: Any,
) -> Context:
    output.mkdir(parents=True, exist_ok=True)
    return Context(
        stage="evaluate",
        settings=STAGE.settings.model_validate({**SETTINGS, **changes}),
        shared={
            "model": ModelBlock(path=str(model), precision="fp32"),
            "constitution": str(constitution) if constitution else None,
            "judge": JudgeBlock(kind=judge),
        },
        inputs=upstream,
        output=output,
        seed=3,
        run_name="tiny/letters",
        tracking=TrackingBlock(),
    )


def of_policy(samples: list[EvaluatedSample], policy: str) -> list[EvaluatedSample]:
    return [sample for sample in samples if sample.policy == policy]


def token_logprobs(folder: Path, sample: EvaluatedSample) -> list[float]:
    """Computed with transformers' forward, one unpadded sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = prompt_ids(tokenizer, sample.prompt)
    ids = [*before, *sample.token_ids]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double() / TEMPERATURE
    every = logits.log_softmax(-1)
    return [float(every[place - 1, ids[place]]) for place in range(len(before), len(ids))]


def test_every_policy_answers_every_held_out_prompt_once(evaluated):
    samples = read_samples(evaluated)
    expected = [(policy, f"p{number}") for policy in (*SETTINGS["policies"], BEST) for number in range(9)]
    assert [(sample.policy, sample.prompt_id) for sample in samples] == expected


def test_equal_policies_with_equal_seeds_write_the_same_and_tie(evaluated):
    samples, report = read_samples(evaluated), read_report(evaluated)
    base, sft = (of_policy(samples, policy) for policy in ("base", "sft"))
    assert [sample.completion for sample in base] == [sample.completion for sample in sft]
    win_rate = report.policies["sft"].win_rate
    assert (win_rate.ties, win_rate.wins, win_rate.losses, win_rate.share.mean) == (9, 0, 0, 0.5)
    assert report.policies["base"].kl_to_reference_k1.mean == pytest.approx(0, abs=1e-5)
    assert report.policies["sft"].kl_to_reference_k1.mean == 0.0


def test_divergence_is_the_sum_over_tokens_of_the_logprob_differences_at_the_temperature(evaluated, upstream):
    for sample in of_policy(read_samples(evaluated), "ppo")[:3]:
        policy = token_logprobs(upstream["ppo"] / "model", sample)
        reference = token_logprobs(upstream["sft"] / "model", sample)
        assert sample.kl_to_reference_k1 == pytest.approx(sum(policy) - sum(reference), abs=1e-3)


def candidates(folder: Path) -> dict[str, list[EvaluatedSample]]:
    """The candidates of best-of-n by prompt."""
    found: dict[str, list[EvaluatedSample]] = {}
    for candidate in read_rows(folder / "best_of.jsonl", EvaluatedSample):
        found.setdefault(candidate.prompt_id, []).append(candidate)
    return found


def test_best_of_n_is_the_candidate_of_the_highest_score(evaluated):
    drawn = candidates(evaluated)
    assert {prompt: len(rows) for prompt, rows in drawn.items()} == {f"p{number}": BEST_OF for number in range(9)}
    for sample in of_policy(read_samples(evaluated), BEST):
        scores = {candidate.completion: candidate.score for candidate in drawn[sample.prompt_id]}
        assert sample.score == max(scores.values()) == scores[sample.completion]
    taken = [max(rows, key=lambda row: row.score).id.rpartition("/")[2] for rows in drawn.values()]
    assert len(set(taken)) > 1, "the best is not always the same number"


def test_candidates_are_the_sft_policys_with_seeds_of_their_own(evaluated, upstream, tiny_model_dir):
    """The engine's completions, one request at a time."""
    from align.engines.engine import Request
    from align.engines.open import open_engine
    from align.settings.blocks import EngineBlock

    engine = open_engine(EngineBlock(), ModelBlock(path=str(tiny_model_dir), precision="fp32"))
    drawn = candidates(evaluated)
    for number, candidate in enumerate(drawn["p4"]):
        seed = derive_seed(3, "best of n", "p4", number)
        [alone] = engine.complete([Request("alone", candidate.prompt, seed, 12, TEMPERATURE)])
        assert (alone.text, alone.tokens) == (candidate.completion, candidate.tokens)
    assert all(len({candidate.completion for candidate in rows}) == BEST_OF for rows in drawn.values())


def test_best_of_n_has_the_figures_of_a_policy_and_a_bound_of_its_divergence(evaluated):
    samples, report = read_samples(evaluated), read_report(evaluated)
    best = report.policies[BEST]
    assert list(report.policies) == ["base", "sft", "ppo", BEST]
    assert best.kl_to_reference_bound == pytest.approx(math.log(BEST_OF) - (BEST_OF - 1) / BEST_OF)
    assert best.kl_to_reference_k1 is best.kl_to_reference_k3 is None
    assert best.reward.mean == pytest.approx(sum(sample.score for sample in of_policy(samples, BEST)) / 9)
    assert best.reward.mean > report.policies["sft"].reward.mean
    assert best.win_rate.wins + best.win_rate.ties + best.win_rate.losses == 9
    assert all(policy.kl_to_reference_bound is None for name, policy in report.policies.items() if name != BEST)


def test_fewer_candidates_are_the_first_of_more(tmp_path, evaluated, upstream, tiny_model_dir, constitution):
    STAGE.run(context(tmp_path, upstream, tiny_model_dir, constitution, best_of=2))
    more = candidates(evaluated)
    for prompt, rows in candidates(tmp_path).items():
        assert [row.completion for row in rows] == [row.completion for row in more[prompt][:2]]


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, []),
        ({"best_of": None, "reward": False}, []),
        ({"reward": False}, ["evaluate.best_of: the best is chosen by the reward stage's model"]),
        ({"sampling": {"temperature": 0}}, ["evaluate.best_of: greedy completions are all alike"]),
    ],
)
def test_best_of_n_needs_a_reward_and_draws_that_differ(changes, faults):
    found = STAGE.check(STAGE.settings.model_validate({**SETTINGS, **changes}), {})
    assert [fault.partition(";")[0] for fault in found] == faults


def test_the_best_of_one_is_refused():
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        STAGE.settings.model_validate({"best_of": 1})


def test_samples_of_another_policy_diverge_from_the_reference(evaluated):
    figures = read_report(evaluated).policies["ppo"]
    samples = of_policy(read_samples(evaluated), "ppo")
    assert figures.kl_to_reference_k1.mean == pytest.approx(sum(s.kl_to_reference_k1 for s in samples) / 9)
    assert figures.kl_to_reference_k3.mean > 0
    assert figures.kl_to_reference_k1.low < figures.kl_to_reference_k1.mean < figures.kl_to_reference_k1.high


def test_scores_are_the_reward_models_at_the_last_token_that_the_policy_drew(evaluated, upstream):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = upstream["reward"] / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    sample = read_samples(evaluated)[0]
    messages = [{"role": "user", "content": sample.prompt[0].content}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert len(sample.token_ids) == sample.tokens
    assert (sample.token_ids[-1] == tokenizer.eos_token_id) == (sample.finish_reason == "stop")
    assert tokenizer.decode(sample.token_ids, skip_special_tokens=True) == sample.completion
    ids = [*prompt, *sample.token_ids]
    with torch.no_grad():
        last = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        expected = model.score(last).item()
    assert sample.score == pytest.approx(expected, abs=1e-4)


def test_rule_shares_recount_from_the_samples_and_respect_applies(evaluated):
    samples, report = read_samples(evaluated), read_report(evaluated)
    for policy, figures in report.policies.items():
        own = of_policy(samples, policy)
        with_e = ["e" in sample.completion.lower() for sample in own]
        without_q = ["q" not in sample.completion.lower() for sample in own if sample.category == "odd"]
        assert figures.rules["has-e"].mean == pytest.approx(sum(with_e) / 9)
        assert (figures.rules["no-q"].mean, figures.rules["no-q"].n) == (pytest.approx(sum(without_q) / 5), 5)


def test_win_rate_by_the_rules_recounts_from_the_samples(evaluated):
    samples = read_samples(evaluated)

    def kept(sample: EvaluatedSample) -> int:
        text = sample.completion.lower()
        return ("e" in text) + ("q" not in text if sample.category == "odd" else 0)

    pairs = list(zip(of_policy(samples, "ppo"), of_policy(samples, "base"), strict=True))
    results = [(kept(ours) > kept(theirs)) + (kept(ours) == kept(theirs)) / 2 for ours, theirs in pairs]
    win_rate = read_report(evaluated).policies["ppo"].win_rate
    assert win_rate.share.mean == pytest.approx(sum(results) / 9)
    assert (win_rate.wins, win_rate.ties, win_rate.losses) == tuple(results.count(result) for result in (1.0, 0.5, 0.0))


def test_an_interrupted_run_ends_with_the_bytes_of_an_undisturbed_one(
    tmp_path, monkeypatch, evaluated, upstream, tiny_model_dir, constitution
):
    """Run the stage, interrupted after every 30 rows, until it is finished."""
    append = Journal.append
    rows = 0

    def fail_at_times(self: Journal, row: Mapping[str, Any]) -> None:
        nonlocal rows
        rows += 1
        if rows % 30 == 0:
            raise KeyboardInterrupt
        append(self, row)

    monkeypatch.setattr(Journal, "append", fail_at_times)
    interruptions = 0
    while not (tmp_path / "report.json").exists():
        try:
            STAGE.run(context(tmp_path, upstream, tiny_model_dir, constitution))
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions > 3
    for name in STAGE.outputs:
        assert (tmp_path / name).read_bytes() == (evaluated / name).read_bytes()


def test_the_table_and_the_models_are_shown(tmp_path, capsys, monkeypatch, upstream, tiny_model_dir, constitution):
    monkeypatch.setenv("COLUMNS", "120")
    STAGE.run(context(tmp_path, upstream, tiny_model_dir, constitution, limit=2))
    shown = capsys.readouterr().out
    for part in ("has-e", "no-q", "win rate vs base", "reward", "KL to sft", "ended by a stop token", "≤ 0.4"):
        assert part in shown
    assert f"{BEST}: the completion with the highest reward among {BEST_OF} by sft" in shown
    assert str(upstream["ppo"] / "model") in shown.replace("\n", "")


def test_without_constitution_and_reward_the_report_says_what_is_missing(tmp_path, capsys, upstream, tiny_model_dir):
    changes = {"reward": False, "best_of": None, "policies": ["base", "sft"], "limit": 2}
    STAGE.run(context(tmp_path, upstream, tiny_model_dir, None, **changes))
    report = read_report(tmp_path)
    assert not (tmp_path / "best_of.jsonl").exists()
    assert set(report.skipped) == {"win rate vs base", "reward", "rule shares"}
    assert report.policies["sft"].win_rate is report.policies["sft"].reward is None
    assert "no win rate vs base: the recipe names no constitution" in capsys.readouterr().out


def test_a_judge_at_chance_gives_no_win_rate_and_the_reason(tmp_path, upstream, tiny_model_dir, constitution):
    STAGE.run(context(tmp_path, upstream, tiny_model_dir, constitution, judge="contrast", limit=2))
    report = read_report(tmp_path)
    assert "better than chance" in report.skipped["win rate vs base"]
    assert report.judge is None
    assert report.policies["ppo"].rules["has-e"].n == 2


def test_a_limit_takes_the_same_prompts_in_whatever_order_they_are_written(tmp_path, upstream, tiny_model_dir):
    from align.stages.evaluate import held_out_prompts

    lines = (upstream["sample"] / "prompts.jsonl").read_text().splitlines(keepends=True)
    shuffled = tmp_path / "sample"
    shuffled.mkdir()
    (shuffled / "prompts.jsonl").write_text("".join(reversed(lines)))
    chosen = [
        {prompt.id for prompt in held_out_prompts(context(tmp_path, {"sample": folder}, tiny_model_dir, None, limit=4))}
        for folder in (upstream["sample"], shuffled)
    ]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 4


def test_an_empty_eval_split_is_a_clear_error(tmp_path, tiny_model_dir):
    write_rows(tmp_path / "prompts.jsonl", [Prompt("p", (Message("user", "Hi"),), "sft")])
    with pytest.raises(InputError, match=r"no prompt in the split eval; raise `prompts\.split\.eval`"):
        STAGE.run(context(tmp_path / "out", {"sample": tmp_path}, tiny_model_dir, None))


def test_inputs_are_the_stages_that_the_settings_need():
    settings = STAGE.settings.model_validate
    assert STAGE.inputs(settings({})) == ("sample",)
    assert STAGE.optional_inputs(settings({})) == ("sft", "reward", "dpo", "ppo")
    chosen = settings({"policies": ["base", "dpo"], "reward": False})
    assert (STAGE.inputs(chosen), STAGE.optional_inputs(chosen)) == (("sample", "dpo"), ("sft",))


def test_a_policy_named_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        STAGE.settings.model_validate({"policies": ["base", "sft", "base"]})


def test_the_report_holds_no_path_of_this_machine(evaluated, upstream, tiny_model_dir):
    content = json.loads((evaluated / "report.json").read_text())
    assert content.pop("base_model") == str(tiny_model_dir)
    assert str(upstream["sft"].parent) not in json.dumps(content)
    assert Report.model_validate(content | {"base_model": "tiny"}).constitution.checked[0].id == "has-e"


def test_rows_name_the_weights_the_seed_and_the_judge_that_made_them(evaluated, upstream, tiny_model_dir, constitution):
    entries = read_provenance(evaluated)
    folders = {"base": tiny_model_dir, "sft": upstream["sft"] / "model", "ppo": upstream["ppo"] / "model"}
    weights = {name: file_digest(folder / "model.safetensors") for name, folder in folders.items()}
    for sample in [*read_samples(evaluated), *read_rows(evaluated / CANDIDATES, EvaluatedSample)]:
        made = entries[sample.provenance]
        assert (made.stage, made.step, made.engine, made.seed) == ("evaluate", "completion", "local", 3)
        assert made.model_digest == weights["sft" if sample.policy == BEST else sample.policy]
        assert (made.settings["temperature"], made.settings["max_new_tokens"]) == (TEMPERATURE, 12)
        if sample.policy in SETTINGS["policies"] and not sample.id.startswith(BEST):
            assert sample.seed == derive_seed(3, "evaluate", sample.prompt_id)
    seeds = [sample.seed for sample in read_rows(evaluated / CANDIDATES, EvaluatedSample)]
    assert len(set(seeds)) == len(seeds)
    judged = [sample for sample in read_samples(evaluated) if sample.judge_provenance]
    assert judged and all(sample.policy != "base" for sample in judged)
    for sample in judged:
        label = entries[sample.judge_provenance]
        assert (label.step, label.engine) == ("label", "rule")
        assert label.constitution_digest == load_constitution(constitution).digest
        assert sample.p_better in (0.5, None) or sample.judged_by
