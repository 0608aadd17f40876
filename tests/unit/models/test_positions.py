"""Rows longer than a model's table of positions are refused before the table is read beyond its end."""

from pathlib import Path

import pytest
import torch

from align.decoding.decode import decode
from align.errors import InputError
from align.models.positions import check_length, learned_positions
from tests.families.checks import BATCH, STAGES, save_family, upstreams
from tests.families.tiny_families import DECODERS, Family, random_model
from tests.stages.training import run

LEARNED = {"GPT-2", "OPT", "OPT-350m"}


@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.name)
def test_only_tables_limit_a_models_rows(family: Family) -> None:
    assert learned_positions(random_model(family)) == (256 if family.name in LEARNED else None)


@pytest.mark.parametrize("name", sorted(LEARNED))
def test_the_longest_row_still_runs_and_one_more_token_is_refused(name: str) -> None:
    model = random_model(next(family for family in DECODERS if family.name == name))
    check_length(model, 256, "")
    with torch.no_grad():
        assert model(input_ids=torch.full((1, 256), 5)).logits.isfinite().all()
    with pytest.raises(InputError, match=r"257 tokens.*256 positions; lower max_length"):
        check_length(model, 257, "lower max_length")


def test_decoding_and_training_say_what_to_lower(tmp_path: Path) -> None:
    gpt2 = next(family for family in DECODERS if family.name == "GPT-2")
    small = Family("GPT-2", "gpt2", {**gpt2.settings, "n_positions": 20, "max_position_embeddings": 20})
    options = {"seeds": [0], "temperature": 1.0, "stop_ids": (), "pad_id": 1}
    with pytest.raises(InputError, match="lower max_new_tokens"):
        decode(random_model(small), [[5] * 15], max_new_tokens=6, **options)
    folder = save_family(small, tmp_path / "model")
    inputs = upstreams(tmp_path / "upstream", folder)
    for name, (stage, settings, reads) in STAGES.items():
        given = {"optimizer": {"learning_rate": 1e-3, **BATCH}, **settings}
        with pytest.raises(InputError, match=f"20 positions; lower {name}.max_length"):
            run(stage, given, folder, tmp_path / name, {key: inputs[key] for key in reads})
