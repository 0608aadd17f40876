"""Model files that do not fit each other are refused; files that merely contain more are accepted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.errors import InputError
from align.models.loading import load_causal_lm, load_tokenizer
from align.rl.loading import load_classifier


@pytest.fixture
def model(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def configure(model: Path, **changes: object) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    if "num_hidden_layers" in changes:
        config.pop("layer_types", None)
    path.write_text(json.dumps({**config, **changes}))


def load(model: Path) -> None:
    load_causal_lm(str(model), torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, r"leaves \d+ of its weights unused, for example model\.layers\.1\."),
        ({"num_hidden_layers": 3}, r"lack \d+ of the model's tensors, for example model\.layers\.2\."),
        ({"hidden_size": 32}, "cannot be loaded as a causal language model"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(
    model: Path, changes: dict[str, object], message: str
) -> None:
    configure(model, **changes)
    with pytest.raises(InputError, match=message):
        load(model)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "v_head.summary.weight"])
def test_weights_that_a_text_model_may_leave_unused_are_accepted(model: Path, name: str) -> None:
    state = load_file(model / "model.safetensors")
    state |= {name: torch.ones(8), "lm_head.weight": state["model.embed_tokens.weight"].clone()}
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    load(model)


def test_a_reward_model_whose_configuration_does_not_fit_is_refused(tmp_path: Path, tiny_reward_dir: Path) -> None:
    reward = Path(shutil.copytree(tiny_reward_dir, tmp_path / "reward"))
    configure(reward, num_hidden_layers=1)
    with pytest.raises(InputError, match=r"leaves \d+ of its weights unused.*; train it again"):
        load_classifier(reward, torch.float32)
    (reward / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"cannot be loaded as a reward model \(.+\); train it again"):
        load_classifier(reward, torch.float32)


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused(model: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(model)
    assert len(load_tokenizer(str(model))) == size + 1, "the chat template does not use the special token"
    tokenizer.add_tokens(["garden-word"])
    tokenizer.save_pretrained(model)
    with pytest.raises(
        InputError, match=rf"token id {size + 1}, but the model's vocabulary only has the ids 0 to {size - 1}"
    ):
        load_tokenizer(str(model))
