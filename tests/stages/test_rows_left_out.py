"""Rows that a model cannot read, or that must not be taught, are left out of the stages, named and kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from align.data.prompts import ODD_SPLIT
from align.data.sources import LEFT_OUT
from align.errors import InputError
from align.records import Message, Prompt, read_jsonl, read_rows
from align.run.stage import Context, Outcome
from align.settings.blocks import ModelBlock, TrackingBlock
from align.settings.data import PromptsBlock
from align.stages.reward import STAGE as REWARD
from align.stages.sample import STAGE as SAMPLE
from align.stages.sample import SampleBlock
from align.stages.sft import STAGE as SFT
from tests.stages.training import context

ALTERNATE = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GREETED = [{"role": "assistant", "content": "Welcome!"}, {"role": "user", "content": "Where is the cat?"}]
QUICK = {"optimizer": {"batch_size": 4, "micro_batch_size": 2}, "epochs": 1}


@pytest.fixture
def alternating(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A model whose template refuses conversations that a user does not begin."""
    folder = tmp_path / "alternating"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "chat_template.jinja").write_text(ALTERNATE)
    return folder


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sample(tmp_path: Path, model: Path, path: str, source: dict[str, Any] | None = None, **prompts: Any) -> Outcome:
    split = {"sft": 1, "preference": 0, "rl": 0, "eval": 0}
    block = {"sources": [{"path": path, **(source or {})}], "split": split, **prompts}
    output = tmp_path / "sample"
    output.mkdir(exist_ok=True)
    return SAMPLE.run(
        Context(
            stage="sample",
            settings=SampleBlock.model_validate({"sampling": {"max_new_tokens": 4}}),
            shared={
                "model": ModelBlock(path=str(model), precision="fp32"),
                "prompts": PromptsBlock.model_validate(block),
            },
            inputs={},
            output=output,
            seed=7,
            run_name="test",
            tracking=TrackingBlock(),
        )
    )


def left_out(folder: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / LEFT_OUT))


def test_a_prompt_that_the_template_refuses_is_named_and_left_out(tmp_path: Path, alternating: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", *({"prompt": f"Cat {n}?"} for n in range(60)), {"prompt": GREETED})
    outcome = sample(tmp_path, alternating, path)

    assert (outcome.counts["samples"], outcome.counts["prompts_unusable"]) == (60, 1)
    (row,) = left_out(tmp_path / "sample")
    assert row["place"] == f"{path}, line 61"
    assert "roles must alternate" in row["why"] and json.loads(row["row"]) == {"prompt": GREETED}


def test_more_refused_prompts_than_the_recipe_allows_are_an_error(tmp_path: Path, alternating: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", *({"prompt": f"Cat {n}?"} for n in range(9)), {"prompt": GREETED})

    with pytest.raises(InputError, match=r"1 of 10 rows cannot be used(.|\n)*line 10: chat template"):
        sample(tmp_path, alternating, path)
    assert sample(tmp_path, alternating, path, {"max_unusable": 0.1}).counts["samples"] == 9


def test_prompts_over_the_limit_are_counted_and_left_out_or_cut(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "prompts.jsonl", {"prompt": "the cat " * 80}, {"prompt": "Where?"})
    outcome = sample(tmp_path, tiny_model_dir, path, max_tokens=60)

    assert (outcome.counts["prompts"], outcome.counts["prompts_too_long"]) == (1, 1)
    assert "1 prompts; 1 prompts_too_long" in capsys.readouterr().out
    cut = sample(tmp_path, tiny_model_dir, path, max_tokens=60, cut="start")
    assert (cut.counts["prompts"], cut.counts["prompts_cut"]) == (2, 1)
    long = next(read_rows(tmp_path / "sample/prompts.jsonl", Prompt))
    assert ("the cat " * 80).strip().endswith(long.prompt[0].content)
    with pytest.raises(InputError, match=r"no prompt is left .2 prompts_too_long"):
        sample(tmp_path, tiny_model_dir, path, max_tokens=2)


def test_prompts_that_leave_no_positions_for_the_answer_are_left_out(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    path = write(tmp_path / "prompts.jsonl", {"prompt": "the cat " * 80}, {"prompt": "Where?"})

    assert sample(tmp_path, folder, path).counts["prompts_too_long"] == 1


def test_a_hub_data_set_s_split_column_and_one_empty_prompt_end_no_run(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [{"prompt": f"Cat {n}?", "split": "train"} for n in range(59)]
    outcome = sample(tmp_path, tiny_model_dir, write(tmp_path / "prompts.jsonl", *rows, {"prompt": " "}))

    assert (outcome.counts["prompts"], outcome.counts[ODD_SPLIT]) == (59, 59)
    assert outcome.counts["prompts_unusable"] == 1


def test_sft_teaches_no_bad_answer_and_says_what_it_trains_on(
    tmp_path: Path, alternating: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"p{n}", "completion": "yes", "label": True} for n in range(8)]
    bad = {"prompt": "p9", "completion": "no", "label": False}
    greeted = {"messages": [*GREETED, {"role": "assistant", "content": "On the mat."}]}
    long = {"prompt": "p10", "completion": "long " * 200}
    path = write(tmp_path / "rows.jsonl", *rows, bad, greeted, long)
    source = {"path": path, "max_unusable": 0.2}
    settings = {**QUICK, "revisions": False, "max_length": 100, "helpful": {"sources": [source]}}
    outcome = SFT.run(context(SFT, settings, alternating, tmp_path / "sft"))

    trained = list(read_jsonl(tmp_path / "sft/demonstrations.jsonl"))
    assert {row["completion"] for row in trained} == {"yes"} and outcome.counts["demonstrations"] == 8
    reasons = {row["reason"]: row["place"].rpartition(" ")[2] for row in left_out(tmp_path / "sft")}
    assert reasons == {
        "demonstrations_labelled_as_bad": "9",
        "demonstrations_refused_by_the_template": "10",
        "demonstrations_too_long": "11",
    }
    told = capsys.readouterr().out
    assert "sft: trains on 8 rows, none of them cut; tokens a row:" in told
    assert "1 demonstrations_labelled_as_bad, 1 demonstrations_refused_by_the_template" in told
    with pytest.raises(InputError, match=r"refuses 1 of 10 demonstrations.*rows\.jsonl, line 10"):
        SFT.run(context(SFT, {**settings, "helpful": {"sources": [{"path": path}]}}, alternating, tmp_path / "again"))


def test_the_system_column_reaches_the_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    row = {"system": "Be a pirate.", "prompt": "Who?", "completion": "Arr."}
    path = write(tmp_path / "rows.jsonl", row)
    settings = {**QUICK, "revisions": False, "helpful": {"sources": [{"path": path}]}}
    SFT.run(context(SFT, settings, tiny_model_dir, tmp_path / "sft"))

    (trained,) = read_jsonl(tmp_path / "sft/demonstrations.jsonl")
    assert trained["prompt"][0] == Message("system", "Be a pirate.").as_dict()


def test_a_long_pair_keeps_neither_half(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [{"prompt": f"p{n}", "chosen": "yes", "rejected": "no"} for n in range(12)]
    path = write(tmp_path / "pairs.jsonl", *rows, {"prompt": "the cat " * 80, "chosen": "yes", "rejected": "no"})
    settings = {**QUICK, "ai": False, "base": "model", "max_length": 60, "human": [{"path": path}], "held_out": 0}
    outcome = REWARD.run(context(REWARD, settings, tiny_model_dir, tmp_path / "reward"))

    assert (outcome.counts["pairs"], outcome.counts["pairs_too_long"]) == (12, 1)
    assert [row["place"] for row in left_out(tmp_path / "reward")] == [f"{path}, line 13"]
