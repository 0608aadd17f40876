"""Tiny models made from scratch, for tests and for the programs that tests start.

A Llama of two layers with a byte-level tokenizer that has SmolLM2's ways: ChatML turns, and a pad token that is the
end-of-turn token.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

START, END = "<|im_start|>", "<|im_end|>"
VOCABULARY = 300
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ("the cat sat on the mat and the dog ran to the other end of the garden",) * 3


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens: every byte, a few merges and two special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END, padding_side="left"
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_config(tokenizer: PreTrainedTokenizerFast, **overrides: object) -> LlamaConfig:
    """Two layers, hidden size 64, four heads that share two key-value heads, tied embeddings."""
    settings: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**{**settings, **overrides})


def build_tiny_model(directory: Path, seed: int = 0, **overrides: object) -> Path:
    """Save a random causal LM with its tokenizer into `directory`; the same seed gives the same weights."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(tokenizer, **overrides))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def build_tiny_reward(directory: Path, seed: int = 1) -> Path:
    """Save a random one-score sequence classifier with the tiny model's tokenizer into `directory`."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def build_tiny_prompts(path: Path, count: int = 24) -> Path:
    """Write `count` one-turn prompts in two categories as JSONL."""
    subjects = ("the cat", "the dog", "the garden", "a mat")
    questions = (
        "What is {}?",
        "Where does {} go?",
        "Tell me about {}.",
        "Why {}?",
        "Describe {} briefly.",
        "Is {} old?",
    )
    texts = [question.format(subject) for question in questions for subject in subjects]
    rows = [
        {"prompt": f"{text} ({number})" if number >= len(texts) else text, "category": ("benign", "odd")[number % 2]}
        for number, text in ((number, texts[number % len(texts)]) for number in range(count))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
