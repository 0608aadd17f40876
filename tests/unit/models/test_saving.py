"""Saved models and adapters open with transformers and PEFT alone, and compute the same."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.models.loading import load_causal_lm, load_tokenizer
from align.models.lora import add_lora
from align.models.saving import save_model
from align.settings.blocks import LoraBlock

IDS = torch.tensor([[1, 40, 41, 42, 43]])


@pytest.fixture
def tokenizer(tiny_model_dir):
    return load_tokenizer(str(tiny_model_dir))


def load(directory, dtype=torch.float32):
    return load_causal_lm(str(directory), dtype)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def shaken(model, adapter="default"):
    """Give an adapter weights that change the model's outputs."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


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


def test_a_gathered_state_is_saved_instead_of_the_models_own(tiny_model_dir, tokenizer, tmp_path):
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


@pytest.mark.parametrize(
    ("flags", "saved"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.6, "do_sample": True}),
        ({"do_sample": True, "temperature": 0.5}, {"temperature": 0.5, "do_sample": True}),
        ({"early_stopping": "sometimes"}, {}),
    ],
)
def test_a_generation_config_is_saved_in_a_form_that_transformers_takes(
    tiny_model_dir, tokenizer, tmp_path, flags, saved
):
    model = load(tiny_model_dir)
    for name, value in flags.items():
        setattr(model.generation_config, name, value)
    save_model(model, tokenizer, tmp_path, torch.float32)
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert {name: value for name, value in written.items() if name in {*flags, "do_sample"}} == saved
    assert written["eos_token_id"] == [tokenizer.eos_token_id]
