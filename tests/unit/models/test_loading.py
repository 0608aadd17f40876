"""Loading, adapting and saving: what is written opens with transformers alone and says the same."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.errors import InputError
from align.models import loading as policy
from align.models.loading import (
    add_lora,
    compute_dtype,
    load_causal_lm,
    load_tokenizer,
    save_model,
    stop_token_ids,
    zero_dropout,
)
from align.settings.blocks import LoraBlock

IDS = torch.tensor([[1, 40, 41, 42, 43]])


@pytest.fixture
def tokenizer(tiny_model_dir):
    return load_tokenizer(str(tiny_model_dir))


@pytest.fixture
def copy_of(tiny_model_dir, tmp_path):
    """The tiny model's folder in a place where it may be changed."""
    return shutil.copytree(tiny_model_dir, tmp_path / "copy")


def load(directory, dtype=torch.float32):
    return load_causal_lm(str(directory), dtype)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def shaken(model, adapter="default"):
    """Give an adapter weights that do something."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


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


def test_model_comes_in_eval_mode_in_the_dtype_asked(tiny_model_dir):
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


def test_new_adapter_changes_nothing_and_trains_in_fp32(tiny_model_dir):
    plain = load(tiny_model_dir, torch.bfloat16)
    before = logits(plain)
    adapted = add_lora(plain, LoraBlock(r=4))
    assert torch.equal(logits(adapted), before)
    trained = {name: p.dtype for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and set(trained.values()) == {torch.float32}
    assert all("lora_" in name for name in trained)


def test_second_adapter_is_added_beside_the_first(tiny_model_dir):
    adapted = shaken(add_lora(load(tiny_model_dir), LoraBlock(r=4)))
    before = logits(adapted)
    assert add_lora(adapted, LoraBlock(r=2), adapter_name="value") is adapted
    assert set(adapted.peft_config) == {"default", "value"}
    assert torch.equal(logits(adapted), before)


def test_unknown_target_modules_are_refused(tiny_model_dir):
    with pytest.raises(InputError, match=r"model\.lora\.target_modules"):
        add_lora(load(tiny_model_dir), LoraBlock(target_modules=("no_such_layer",)))


def test_embeddings_cannot_be_adapted(tiny_model_dir):
    with pytest.raises(InputError, match="embeddings"):
        add_lora(load(tiny_model_dir), LoraBlock(target_modules=("embed_tokens",)))


def test_stop_tokens_are_the_models_the_tokenizers_and_the_templates(tiny_model_dir, tokenizer):
    model = load(tiny_model_dir)
    end = tokenizer.eos_token_id
    assert stop_token_ids(model, tokenizer) == (end,)
    model.generation_config.eos_token_id = [7, end]
    assert stop_token_ids(model, tokenizer) == tuple(sorted((7, end)))
    model.generation_config.eos_token_id = None
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_start|>")
    assert stop_token_ids(model, tokenizer) == tuple(sorted((tokenizer.bos_token_id, end)))


def test_saved_model_opens_with_transformers_alone_and_chats(tiny_model_dir, tokenizer, tmp_path):
    model = load(tiny_model_dir)
    save_model(model, tokenizer, tmp_path, torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(again), logits(model))
    assert again.generation_config.eos_token_id == [tokenizer.eos_token_id]
    own = AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "Where is the cat?"}]
    inputs = own.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert again.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    assert not (tmp_path / "adapter").exists()


def test_saved_weights_are_safetensors_with_tied_embeddings_once(tiny_model_dir, tokenizer, tmp_path):
    save_model(load(tiny_model_dir), tokenizer, tmp_path, torch.bfloat16)
    assert not list((tmp_path / "model").glob("*.bin"))
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as weights:
        assert "model.embed_tokens.weight" in weights.keys()  # noqa: SIM118
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
        assert weights.get_tensor("model.norm.weight").dtype == torch.bfloat16
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_model_equals_pefts_own_merge(tiny_model_dir, tokenizer, tmp_path, dtype):
    adapted = shaken(add_lora(load(tiny_model_dir, dtype), LoraBlock(r=4)))
    before = logits(adapted)
    save_model(adapted, tokenizer, tmp_path, torch.float32)
    assert torch.equal(logits(adapted), before)
    base = load(tiny_model_dir, dtype).float()
    reference = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    torch.testing.assert_close(logits(load(tmp_path / "model")), logits(reference), atol=1e-5, rtol=1e-4)


def test_saved_adapter_opens_with_peft_alone(tiny_model_dir, tokenizer, tmp_path):
    adapted = shaken(add_lora(load(tiny_model_dir), LoraBlock(r=4)))
    save_model(adapted, tokenizer, tmp_path, torch.float32)
    again = PeftModel.from_pretrained(load(tiny_model_dir), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(again), logits(adapted))


def test_named_adapter_is_saved_and_the_others_are_not(tiny_model_dir, tokenizer, tmp_path):
    adapted = add_lora(load(tiny_model_dir), LoraBlock(r=4), adapter_name="policy")
    add_lora(adapted, LoraBlock(r=4), adapter_name="value")
    shaken(adapted, "policy")
    expected = logits(adapted)
    shaken(adapted, "value")
    save_model(adapted, tokenizer, tmp_path, torch.float32, adapter_name="policy")
    torch.testing.assert_close(logits(load(tmp_path / "model")), expected, atol=1e-5, rtol=1e-4)
    again = PeftModel.from_pretrained(load(tiny_model_dir), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(again), expected)


def test_saved_twice_the_bytes_are_the_same(tiny_model_dir, tokenizer, tmp_path):
    adapted = shaken(add_lora(load(tiny_model_dir), LoraBlock(r=4)))
    files = []
    for name in ("one", "two"):
        save_model(adapted, tokenizer, tmp_path / name, torch.bfloat16)
        root = tmp_path / name
        files.append({str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()})
    assert files[0] == files[1]


def test_adapter_names_a_base_model_below_the_working_folder_by_its_relative_path(
    tiny_model_dir, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tiny_model_dir.parent)
    save_model(add_lora(load(tiny_model_dir), LoraBlock(r=4)), tokenizer, tmp_path, torch.float32)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_model_dir.name


def test_state_gathered_elsewhere_is_saved_in_the_models_stead(tiny_model_dir, tokenizer, tmp_path):
    model = load(tiny_model_dir)
    state = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    save_model(model, tokenizer, tmp_path, torch.float32, state_dict=state)
    saved = load(tmp_path / "model").state_dict()
    assert all(torch.equal(saved[name], state[name]) for name in saved)


def test_incomplete_state_is_refused(tiny_model_dir, tokenizer, tmp_path):
    model = load(tiny_model_dir)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1" not in name}
    with pytest.raises(ValueError, match="lacks"):
        save_model(model, tokenizer, tmp_path, torch.float32, state_dict=state)


def test_classifier_saves_its_trained_head(tiny_reward_dir, tokenizer, tmp_path):
    scorer = AutoModelForSequenceClassification.from_pretrained(str(tiny_reward_dir), dtype=torch.float32)
    adapted = shaken(add_lora(scorer, LoraBlock(r=4), task_type="SEQ_CLS")).eval()
    for name, parameter in adapted.named_parameters():
        if "score.modules_to_save" in name:
            parameter.data += 1.0
    save_model(adapted, tokenizer, tmp_path, torch.float32)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(logits(again), logits(adapted), atol=1e-4, rtol=1e-4)


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
def test_auto_precision_is_bf16_where_the_cpu_gains_by_it(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert policy.default_device().type == "cpu"
    assert compute_dtype("auto") is dtype
