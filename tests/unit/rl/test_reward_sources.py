"""Rewards that are not the reward stage's: classifiers of other families, functions, and several of them together."""

import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaForSequenceClassification,
)

from align.errors import AlignError, InputError
from align.records import Message
from align.rl.reward_sources import FunctionReward, load_classifier_reward, load_function_reward
from align.rl.rewards import Rewards, RewardSource
from align.rl.settings import PpoBlock, RewardSourceBlock, ScoreBlock
from tests.tiny import build_tiny_model, build_tokenizer, tiny_config

PROMPTS = [(Message("user", "where is the cat"),), (Message("user", "the dog"), Message("assistant", "sat"))]
ANSWERS = ["on the mat", "the garden is old"]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] where is the cat dog sat on mat garden old".split()


@pytest.fixture
def encoder_dir(tmp_path: Path) -> Path:
    """A random cross-encoder with three named outputs, and a tokenizer of its own without a chat template."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=3,
        id2label={0: "rude", 1: "plain", 2: "kind"},
        label2id={"rude": 0, "plain": 1, "kind": 2},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    return folder


def load(folder: Path, label: str | None = None, completion_alone: bool = False):
    return load_classifier_reward(
        str(folder),
        revision=None,
        label=label,
        completion_alone=completion_alone,
        system_prompt=None,
        batch_size=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("completion_alone", [False, True])
def test_a_cross_encoder_reads_prompt_and_completion_as_its_pair_of_texts(encoder_dir, completion_alone):
    scores = load(encoder_dir, "kind", completion_alone)(PROMPTS, ANSWERS)

    tokenizer = AutoTokenizer.from_pretrained(encoder_dir)
    model = BertForSequenceClassification.from_pretrained(encoder_dir).eval()
    before = ["where is the cat", "the dog\n\nsat"]
    for row, answer in enumerate(ANSWERS):
        texts = (answer,) if completion_alone else (before[row], answer)
        with torch.no_grad():
            expected = model(**tokenizer(*texts, return_tensors="pt")).logits[0, 2]
        assert float(scores[row]) == pytest.approx(float(expected), abs=1e-5)


def test_what_is_too_long_loses_its_beginning(encoder_dir):
    reward = load(encoder_dir, "2")
    assert reward.limit == 16
    talk = (Message("user", "the cat " * 20),)
    ids = reward._encoded(talk, "on the mat")["input_ids"]
    assert len(ids) == 16
    assert reward.tokenizer.decode(ids).endswith("on the mat [SEP]")
    assert math.isfinite(float(reward([talk], ["on the mat"])[0]))


def test_a_language_model_with_several_scores_is_read_where_the_turn_ends(tmp_path):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=2)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scores = load(tmp_path, "LABEL_1")([PROMPTS[0], PROMPTS[0]], ANSWERS)
    for row, answer in enumerate(ANSWERS):
        talk = [{"role": "user", "content": "where is the cat"}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(talk, tokenize=False).removesuffix("\n")
        with torch.no_grad():
            state = model.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        assert float(scores[row]) == pytest.approx(float(model.score(state)[1]), abs=1e-5)


@pytest.mark.parametrize(
    ("label", "fault"), [(None, "has several outputs; set `label`"), ("warm", "has no output 'warm'; set `label`")]
)
def test_an_output_that_is_not_named_is_asked_for(encoder_dir, label, fault):
    with pytest.raises(InputError, match=rf"{fault} to one of rude, plain, kind"):
        load(encoder_dir, label)


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"is not a trained sequence classifier: it lacks score\.weight"):
        load(build_tiny_model(tmp_path), None)


MODULE = """
def brevity(prompts, completions):
    assert prompts[0][-1] == {"role": "user", "content": "where is the cat"}
    return [-len(completion) for completion in completions]

def one(prompts, completions):
    return [1.0]

def wrong(prompts, completions):
    return 1 / 0
"""


@pytest.fixture
def rewards_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_rewards_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_function_of_the_working_folder_scores_completions(rewards_module):
    assert load_function_reward(f"{rewards_module}:brevity")(PROMPTS, ANSWERS).tolist() == [-10.0, -17.0]


def test_faults_of_a_function_name_it(rewards_module):
    with pytest.raises(InputError, match=r"no_such:f: the module cannot be imported \(ModuleNotFoundError"):
        load_function_reward("no_such:f")
    with pytest.raises(InputError, match="has no function 'breviti'"):
        load_function_reward(f"{rewards_module}:breviti")
    with pytest.raises(AlignError, match=r"wrong failed \(ZeroDivisionError"):
        load_function_reward(f"{rewards_module}:wrong")(PROMPTS, ANSWERS)
    with pytest.raises(AlignError, match="one gave 1 scores for 2 completions"):
        load_function_reward(f"{rewards_module}:one")(PROMPTS, ANSWERS)


def sources(**changes: float) -> list[RewardSource]:
    """Two sources that give 1 and 5, 3 and 3, with moments (1, 1) for the first."""
    first = FunctionReward("a", lambda prompts, completions: [1.0, 5.0])
    second = FunctionReward("b", lambda prompts, completions: [3.0, 3.0])
    gold = FunctionReward("g", lambda prompts, completions: [100.0, 100.0])
    return [
        RewardSource("gold", gold, gold=True),
        RewardSource("a", first, weight=changes.get("weight", 1.0)),
        RewardSource("b", second),
    ]


@pytest.mark.parametrize(
    ("block", "weight", "expected"),
    [
        ({"combine": "mean"}, 1.0, [2.0, 4.0]),
        ({"combine": "mean"}, 3.0, [1.5, 4.5]),
        ({"combine": "minimum"}, 1.0, [1.0, 3.0]),
        ({"disagreement_coef": 0.5}, 1.0, [2.0 - 0.5 * 1.0, 4.0 - 0.5 * 1.0]),
    ],
)
def test_sources_are_combined(block, weight, expected):
    rewards = Rewards(sources(weight=weight), ScoreBlock(normalise="none", clip=None, **block))
    raw = rewards.scores(PROMPTS, ANSWERS)
    assert (rewards.names, rewards.trained) == (["a", "b", "gold"], 2)
    assert raw[:, 2].tolist() == [100.0, 100.0]
    assert rewards.combined(rewards.standardised(raw)).tolist() == pytest.approx(expected)


def test_running_moments_of_each_source_survive_a_checkpoint():
    block = ScoreBlock(normalise="running", clip=None)
    rewards, resumed = Rewards(sources(), block), Rewards(sources(), block)
    raw = rewards.scores(PROMPTS, ANSWERS)
    first = rewards.standardised(raw)
    assert first.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    resumed.load_state(rewards.state())
    assert torch.equal(rewards.standardised(raw + 1), resumed.standardised(raw + 1))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({}, "; set: none"),
        ({"stage": "reward", "function": "a:b"}, "; set: stage, function"),
        ({"function": "brevity"}, "function must be module:function"),
        ({"function": "a:b", "label": "x"}, "label: only a `model` reads this"),
    ],
)
def test_a_source_is_one_thing(given, fault):
    with pytest.raises(ValueError, match=fault):
        RewardSourceBlock(**given)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"rewards": [{"stage": "reward", "gold": True}]}, "every source is gold"),
        ({"rewards": [{"function": "a:f"}, {"function": "b:f"}]}, r"have the same name \(f, f\)"),
        ({"rewards": [{"function": "a:f", "weight": 2}], "score": {"combine": "minimum"}}, "the minimum uses no"),
        ({"score": {"combine": "minimum", "disagreement_coef": 1}}, "disagreement_coef needs the mean"),
    ],
)
def test_sources_must_fit_together(given, fault):
    with pytest.raises(ValueError, match=fault):
        PpoBlock(**given)


def test_names_in_figures_are_the_stages_folders_and_functions_own():
    blocks = [{"stage": "reward"}, {"model": "runs/x/reward/model/"}, {"model": "org/rm"}, {"function": "a.b:short"}]
    assert [RewardSourceBlock(**block).key for block in blocks] == ["reward", "reward", "rm", "short"]
    assert RewardSourceBlock(stage="reward", name="proxy").key == "proxy"
