"""Rewards that are not the reward stage's: classifiers of other families, functions, and several of them together."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from align.data.chat import prompt_ids
from align.errors import AlignError, InputError
from align.records import Message, as_dicts
from align.rl.classifier_reward import ClassifierReward, load_classifier_reward
from align.rl.reward_sources import FunctionReward, load_function_reward
from align.rl.rewards import Response, RewardModel, Rewards, RewardSource
from align.rl.settings import PpoBlock, RewardSourceBlock, ScoreBlock
from tests.tiny import TEMPLATE, build_tiny_model, build_tokenizer, tiny_config

PROMPTS = [(Message("user", "where is the cat"),), (Message("user", "the dog"), Message("assistant", "sat"))]
ANSWERS = ["on the mat", "the garden is old"]
RESPONSES = [Response(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
FOREIGN = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
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


def load(folder: Path, label: str | None = None, completion_alone: bool = False, **options: Any) -> ClassifierReward:
    return load_classifier_reward(
        str(folder),
        revision=None,
        label=label,
        completion_alone=completion_alone,
        system_prompt=None,
        batch_size=2,
        device=torch.device("cpu"),
        **{
            "policy_tokenizer": FOREIGN,
            "dtype": torch.float32,
            **options,
        },
    )


@pytest.mark.parametrize("completion_alone", [False, True])
def test_a_cross_encoder_reads_prompt_and_completion_as_its_pair_of_texts(encoder_dir, completion_alone):
    scores = load(encoder_dir, "kind", completion_alone)(RESPONSES)

    tokenizer = AutoTokenizer.from_pretrained(encoder_dir)
    model = BertForSequenceClassification.from_pretrained(encoder_dir).eval()
    before = ["where is the cat", "the dog\n\nsat"]
    for row, answer in enumerate(ANSWERS):
        texts = (answer,) if completion_alone else (before[row], answer)
        with torch.no_grad():
            expected = model(**tokenizer(*texts, return_tensors="pt")).logits[0, 2]
        assert float(scores[row]) == pytest.approx(float(expected), abs=1e-5)


def test_a_prompt_that_is_too_long_loses_its_beginning_and_the_answer_nothing(encoder_dir):
    reward = load(encoder_dir, "2")
    assert reward.limit == 16
    talk = (Message("user", "where is the " * 10 + "old cat"),)
    ids = reward._encoded(Response(talk, "the dog sat on the mat"))["input_ids"]
    assert reward.tokenizer.decode(ids) == ("[CLS] is the where is the old cat [SEP] the dog sat on the mat [SEP]")
    assert math.isfinite(float(reward([Response(talk, "on the mat")])[0]))
    assert (reward.take_cut(), reward.take_cut()) == (2, 0)


@pytest.mark.parametrize("completion_alone", [False, True])
def test_an_answer_that_is_too_long_by_itself_keeps_its_beginning(encoder_dir, completion_alone):
    reward = load(encoder_dir, "2", completion_alone)
    ids = reward._encoded(Response(PROMPTS[0], "the cat " * 3 + "sat on the mat " * 9))["input_ids"]
    assert len(ids) == 16
    text = reward.tokenizer.decode(ids).replace("[CLS] [SEP]", "[CLS]")
    assert text.startswith("[CLS] the cat the cat the cat sat on the mat") and text.endswith("[SEP]")
    assert reward.take_cut() == 1
    again = reward._encoded(Response(PROMPTS[0], "on the mat"))["input_ids"]
    assert reward.tokenizer.decode(again).endswith("on the mat [SEP]") and reward.take_cut() == 0


def build_classifier(folder: Path, **changes: Any) -> PreTrainedTokenizerFast:
    """A random decoder with two scores, and its tokenizer."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=2, **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def score_of(folder: Path, ids: list[int]) -> float:
    """The second score of a row of ids alone, read by transformers' own classifier at the row's last token."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1])[1])


def test_another_familys_language_model_is_read_at_the_last_token_that_its_template_writes(tmp_path):
    tokenizer = build_classifier(tmp_path)
    reward = load(tmp_path, "LABEL_1")
    assert not reward.own_tokens
    for response, score in zip(RESPONSES, reward(RESPONSES), strict=True):
        talk = [*as_dicts(response.prompt), {"role": "assistant", "content": response.answer}]
        ids = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
        assert tokenizer.decode(ids[-1:]) == "\n", "this template goes on after the end of the turn"
        assert float(score) == pytest.approx(score_of(tmp_path, ids), abs=1e-5)


def test_an_answer_that_was_cut_gets_no_end_of_turn(tmp_path):
    tokenizer = build_classifier(tmp_path)
    [score] = load(tmp_path, "LABEL_1")([Response(PROMPTS[0], "on the", finished=False)])
    text = "<|im_start|>user\nwhere is the cat<|im_end|>\n<|im_start|>assistant\non the"
    expected = score_of(tmp_path, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert float(score) == pytest.approx(expected, abs=1e-5)


def test_a_classifier_with_the_policys_tokenizer_reads_the_policys_tokens(tmp_path):
    tokenizer = build_classifier(tmp_path)
    reward = load(tmp_path, "LABEL_1", policy_tokenizer=build_tokenizer())
    assert reward.own_tokens
    prompt = prompt_ids(tokenizer, PROMPTS[0])
    spelled = [tokenizer.convert_tokens_to_ids(letter if letter != " " else "Ġ") for letter in "on the mat"]
    assert tokenizer("on the mat")["input_ids"] != spelled and tokenizer.decode(spelled) == "on the mat"
    stopped = [*spelled, tokenizer.eos_token_id]
    responses = [
        Response(PROMPTS[0], "on the mat", True, True, prompt, stopped),
        Response(PROMPTS[0], "on the mat", False, True, prompt, spelled),
    ]
    newline = tokenizer("\n")["input_ids"]
    expected = [score_of(tmp_path, [*prompt, *stopped, *newline]), score_of(tmp_path, [*prompt, *spelled])]
    assert reward(responses).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_conversation_that_is_too_long_for_a_language_model_loses_its_beginning(tmp_path):
    tokenizer = build_classifier(tmp_path, max_position_embeddings=24)
    reward = load(tmp_path, "LABEL_1")
    talk = (Message("user", "the cat " * 40),)
    long, short = (reward._encoded(Response(talk, text))["input_ids"] for text in ("zebra " * 40, "on the mat"))
    assert len(long) == len(short) == 24 and reward.take_cut() == 2
    assert tokenizer.decode(short).endswith("assistant\non the mat<|im_end|>\n")
    assert "zebra" in tokenizer.decode(long)


def test_a_conversation_that_a_template_cannot_render_is_not_scored_and_ends_nothing(tmp_path):
    tokenizer = build_classifier(tmp_path)
    tokenizer.chat_template = TEMPLATE.replace(
        "{% for message in messages %}",
        "{% for message in messages %}{% if 'dog' in message['content'] %}{{ raise_exception('no dogs') }}{% endif %}",
    )
    tokenizer.save_pretrained(tmp_path)
    rewards = Rewards([RewardSource("other", load(tmp_path, "LABEL_1"))], ScoreBlock())
    scores = rewards.scores(RESPONSES)
    assert scores.isnan().tolist() == [[False], [True]]
    filled, shares = rewards.fill_unscored(scores)
    assert filled[1] == filled[0] and shares == {"other": 0.5}


def test_a_classifier_without_a_pad_token_in_its_config_scores_a_batch(tmp_path):
    build_classifier(tmp_path, pad_token_id=None)
    reward = load(tmp_path, "LABEL_1")
    alone = torch.cat([reward([response]) for response in RESPONSES])
    assert torch.allclose(reward(RESPONSES), alone, atol=1e-5)


def test_a_roberta_reads_as_many_tokens_as_it_has_positions_for(tmp_path, encoder_dir):
    config = RobertaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=14,
        pad_token_id=1,
        num_labels=1,
    )
    model = RobertaForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    BertTokenizerFast(vocab=str(encoder_dir / "vocab.txt")).save_pretrained(tmp_path)
    reward = load(tmp_path)
    assert reward.limit == 12
    assert math.isfinite(float(reward([Response(PROMPTS[0], "the cat " * 30)])[0]))


def test_scores_of_an_encoder_in_bf16_do_not_tie(encoder_dir):
    """With a bias of 4, numbers of bf16 are 1/32 apart, and these scores differ by less."""
    model = BertForSequenceClassification.from_pretrained(encoder_dir)
    with torch.no_grad():
        model.classifier.weight.mul_(100)
        model.classifier.bias.fill_(4.0)
    model.save_pretrained(encoder_dir)
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS[5:], k=6)) for _ in range(32)]
    scores = load(encoder_dir, "kind", dtype=torch.bfloat16)([Response(PROMPTS[0], text) for text in texts])
    assert float(scores.std()) < 1 / 32
    assert len(set(scores.tolist())) >= 28 > 4 > len(set(scores.bfloat16().tolist()))
    exact = load(encoder_dir, "kind")([Response(PROMPTS[0], text) for text in texts])
    assert torch.allclose(scores, exact, atol=0.01)


def test_nothing_is_asked_about_a_response_without_an_answer(rewards_module):
    cut = Response(PROMPTS[0], "", finished=False, answered=False)
    rewards = Rewards([RewardSource("short", load_function_reward(f"{rewards_module}:brevity"))], ScoreBlock())
    scores = rewards.scores([RESPONSES[0], cut, RESPONSES[0]])
    assert scores[:, 0].isnan().tolist() == [False, True, False]
    filled, shares = rewards.fill_unscored(scores)
    assert filled[:, 0].tolist() == [-10.0] * 3 and shares == {"short": pytest.approx(1 / 3)}


def test_a_batch_without_any_score_counts_as_average_once_a_mean_is_known(rewards_module):
    cut = Response(PROMPTS[0], "", finished=False, answered=False)
    source = RewardSource("short", load_function_reward(f"{rewards_module}:brevity"))
    rewards = Rewards([source], ScoreBlock(normalise="running"))
    with pytest.raises(AlignError, match="short scored no completion: the limit cut every thought"):
        rewards.fill_unscored(rewards.scores([cut]))
    rewards.standardised(rewards.scores(RESPONSES))
    assert rewards.fill_unscored(rewards.scores([cut]))[0].tolist() == [[-13.5]]


def test_a_broken_source_is_not_taken_for_one_that_abstains():
    for value, shown in ((math.nan, math.inf), (math.inf, math.inf), (-math.inf, -math.inf)):
        broken = FunctionReward("broken", lambda prompts, completions, value=value: [1.0, value])
        scores = Rewards([RewardSource("broken", broken)], ScoreBlock()).scores(RESPONSES)
        assert scores[:, 0].tolist() == [1.0, shown]


def test_a_reward_stages_model_reads_what_the_policy_read_and_wrote():
    seen = []

    def scores(rows):
        seen.extend(rows)
        return torch.tensor([float(len(row)) for row in rows])

    responses = [
        Response(PROMPTS[0], "x", True, True, (1, 2, 3), (4, 5)),
        Response(PROMPTS[0], "y", False, True, (1,), (6,)),
    ]
    assert RewardModel(scores, batch_size=1)(responses).tolist() == [5.0, 2.0]
    assert sorted(seen) == [[1, 2, 3, 4, 5], [1, 6]]


def test_a_sharded_models_passes_do_not_depend_on_what_was_answered():
    passes = []

    def scores(rows):
        passes.append(len(rows))
        return torch.ones(len(rows))

    responses = [
        Response(PROMPTS[0], "x", answered=number == 0, prompt_ids=(1,), token_ids=(2,)) for number in range(4)
    ]
    found = Rewards([RewardSource("reward", RewardModel(scores, batch_size=2))], ScoreBlock()).scores(responses)
    assert passes == [2, 2]
    assert found[:, 0].isnan().tolist() == [False, True, True, True]


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
    assert load_function_reward(f"{rewards_module}:brevity")(RESPONSES).tolist() == [-10.0, -17.0]


def test_faults_of_a_function_name_it(rewards_module):
    with pytest.raises(InputError, match=r"no_such:f: the module cannot be imported \(ModuleNotFoundError"):
        load_function_reward("no_such:f")
    with pytest.raises(InputError, match="has no function 'breviti'"):
        load_function_reward(f"{rewards_module}:breviti")
    with pytest.raises(AlignError, match=r"wrong failed \(ZeroDivisionError"):
        load_function_reward(f"{rewards_module}:wrong")(RESPONSES)
    with pytest.raises(AlignError, match="one gave 1 scores for 2 completions"):
        load_function_reward(f"{rewards_module}:one")(RESPONSES)


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
    raw = rewards.scores(RESPONSES)
    assert (rewards.names, rewards.trained) == (["a", "b", "gold"], 2)
    assert raw[:, 2].tolist() == [100.0, 100.0]
    assert rewards.combined(rewards.standardised(raw)).tolist() == pytest.approx(expected)


def test_running_moments_of_each_source_survive_a_checkpoint():
    block = ScoreBlock(normalise="running", clip=None)
    rewards, resumed = Rewards(sources(), block), Rewards(sources(), block)
    raw = rewards.scores(RESPONSES)
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
