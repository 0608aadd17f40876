"""What is peculiar to models with experts and to models that also see: router losses, adapters, and what is saved."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from align.models.lora import add_lora
from align.models.saving import save_model
from align.records import read_jsonl
from align.settings.blocks import LoraBlock
from tests.families.checks import LORA, STAGES, save_family, upstreams
from tests.families.tiny_families import DECODERS, Family, random_model
from tests.stages.training import run
from tests.tiny import build_tokenizer

FAMILIES = {family.name: family for family in DECODERS}
IDS = torch.arange(2, 30)[None]


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_routers_loss_is_logged_and_not_left_in_what_is_saved(name: str, tmp_path: Path) -> None:
    folder = save_family(FAMILIES["Mixtral"], tmp_path / "model")
    inputs = upstreams(tmp_path / "upstream", folder)
    stage, settings, reads = STAGES[name]
    given = {"optimizer": {"learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": 2}, **settings}
    run(stage, given, folder, tmp_path / "out", {key: inputs[key] for key in reads}, lora=LORA)
    rows = [row for row in read_jsonl(tmp_path / "out/metrics.jsonl") if "loss" in row]
    # Evenly used, each of 4 experts of which a token takes 2 has a loss of 2 in all (Fedus et al. 2021, eq. 4).
    assert rows and all(1.5 < row["aux_loss"] < 4 for row in rows)
    assert not AutoConfig.from_pretrained(tmp_path / "out/model").output_router_logits


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "DeepSeek-V3"])
def test_a_saved_adapter_on_experts_loads_with_peft_and_equals_the_merged_model(name: str, tmp_path: Path) -> None:
    folder = save_family(FAMILIES[name], tmp_path / "base")
    model = add_lora(AutoModelForCausalLM.from_pretrained(folder), LoraBlock(**LORA))
    assert any("experts" in name and "lora_B" in name for name, _ in model.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_(0, 0.1)
    save_model(model, build_tokenizer(), tmp_path, torch.float32)
    with torch.no_grad():
        adapted = model.eval()(input_ids=IDS).logits
        plain = AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(input_ids=IDS).logits
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter"))
        assert (adapted - plain).abs().max() > 0.1
        torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(loaded(input_ids=IDS).logits, adapted, atol=1e-4, rtol=1e-4)


def test_adapters_leave_out_what_sees() -> None:
    model = add_lora(random_model(FAMILIES["Gemma 3 with vision"]), LoraBlock(**LORA))
    adapted = {name for name, _ in model.named_parameters() if ".lora_A." in name}
    assert len(adapted) == 2 * 7
    assert all(".language_model." in name for name in adapted)


def test_layers_that_cannot_be_merged_are_refused_before_training() -> None:
    from align.errors import InputError

    with pytest.raises(InputError, match="cannot be merged"):
        add_lora(random_model(Family("Llama", "llama", {})), LoraBlock(r=2, target_modules=("embed_tokens",)))
