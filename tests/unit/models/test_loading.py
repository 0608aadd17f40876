"""Loading models and tokenizers: what is refused, and what is set."""

import json
import shutil

import pytest
import torch

from align.errors import InputError
from align.models.loading import (
    compute_dtype,
    default_device,
    load_causal_lm,
    load_tokenizer,
    stop_token_ids,
    zero_dropout,
)

IDS = torch.tensor([[1, 40, 41, 42, 43]])


@pytest.fixture
def tokenizer(tiny_model_dir):
    return load_tokenizer(str(tiny_model_dir))


@pytest.fixture
def copy_of(tiny_model_dir, tmp_path):
    """A copy of the tiny model's folder that a test may change."""
    return shutil.copytree(tiny_model_dir, tmp_path / "copy")


def load(directory, dtype=torch.float32):
    return load_causal_lm(str(directory), dtype)


def test_tokenizer_pads_left_and_keeps_its_template(tokenizer):
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template


def test_missing_pad_token_is_the_end_token(copy_of):
    path = copy_of / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(copy_of))
    assert tokenizer.pad_token == tokenizer.eos_token


def test_tokenizer_without_chat_template_is_refused(copy_of):
    (copy_of / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(str(copy_of))


def test_folder_without_tokenizer_is_refused(copy_of):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy_of / name).unlink()
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(str(copy_of))


def test_model_is_in_eval_mode_and_in_the_requested_dtype(tiny_model_dir):
    model = load(tiny_model_dir, torch.bfloat16)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_weights_that_lack_a_tensor_are_refused(copy_of):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy_of / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy_of / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 .*layers\.1\.mlp\.up_proj"):
        load(copy_of)


def test_damaged_weights_are_refused(copy_of):
    (copy_of / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(copy_of)


def test_dropout_is_off_even_in_training_mode(tiny_model_dir):
    model = load(tiny_model_dir)
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.extra = torch.nn.Dropout(0.5)
    zero_dropout(model)
    assert model.extra.p == 0.0
    model.train()
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_stop_tokens_are_the_models_the_tokenizers_and_the_templates(tiny_model_dir, tokenizer):
    model = load(tiny_model_dir)
    end = tokenizer.eos_token_id
    assert stop_token_ids(model, tokenizer) == (end,)
    model.generation_config.eos_token_id = [7, end]
    assert stop_token_ids(model, tokenizer) == tuple(sorted((7, end)))
    model.generation_config.eos_token_id = None
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_start|>")
    assert stop_token_ids(model, tokenizer) == tuple(sorted((tokenizer.bos_token_id, end)))


def test_precision_names():
    assert compute_dtype("bf16") is torch.bfloat16
    assert compute_dtype("fp32") is torch.float32
    with pytest.raises(InputError, match=r"model\.precision"):
        compute_dtype("fp16")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.float32),
        ({"avx2": True}, torch.float32),
    ],
)
def test_auto_precision_is_bf16_where_the_cpu_is_faster_with_it(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert default_device().type == "cpu"
    assert compute_dtype("auto") is dtype


def test_a_models_own_code_that_lacks_a_package_says_which(tmp_path, tiny_model_dir):
    folder = tmp_path / "own"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": auto_map}))
    (folder / "mine.py").write_text(
        "import no_such_package\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig): model_type = 'mine'\n"
        "class Model(LlamaForCausalLM): config_class = Config\n"
    )
    for load in (load_tokenizer, lambda path, **options: load_causal_lm(path, torch.float32, **options)):
        with pytest.raises(InputError, match=r"needs a package that is not installed.*no_such_package"):
            load(str(folder), trust_remote_code=True)
