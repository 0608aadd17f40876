"""`align export` of a finished run by the real command: `datasets` loads it, TRL trains on it, the rows are right."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import DatasetDict, load_dataset
from huggingface_hub import DatasetCard
from trl.data_utils import is_conversational

from align.run.artefacts import MANIFEST, file_digest
from tests.launch.pipeline import Run, in_process, rows

SETS = ("preferences", "sft", "revisions")


@pytest.fixture(scope="module")
def exported(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hub"
    printed = finished.make("export", str(finished.own), "--output", str(folder))
    assert "preferences: " in printed
    return folder


@pytest.fixture
def data(exported: Path, tmp_path: Path) -> dict[str, DatasetDict]:
    return {name: load_dataset(str(exported), name, cache_dir=str(tmp_path / "cache")) for name in SETS}


def test_the_folder_loads_as_it_is_and_its_first_data_set_is_the_default(exported: Path, tmp_path: Path) -> None:
    loaded = load_dataset(str(exported), cache_dir=str(tmp_path / "cache"))
    assert {"prompt", "chosen", "rejected", "probability"} <= set(loaded["train"].column_names)


def test_every_row_of_the_run_is_there_as_it_was(finished: Run, data: dict[str, DatasetDict]) -> None:
    pairs = {row["id"]: row for row in finished.rows("compare/pairs.jsonl")}
    found = {row["id"]: row for split in data["preferences"].values() for row in split}
    assert found.keys() == pairs.keys()
    for name in ("prompt", "chosen", "rejected", "probability", "source", "category"):
        assert {key: row[name] for key, row in found.items()} == {key: row[name] for key, row in pairs.items()}
    assert all(row["margin"] == 2 * row["probability"] - 1 for row in found.values())
    demonstrations = finished.rows("sft/demonstrations.jsonl")
    assert data["sft"]["train"]["messages"][:] == [
        [*row["prompt"], {"role": "assistant", "content": row["completion"]}] for row in demonstrations
    ]
    revisions, made = data["revisions"]["train"], finished.rows("revise/critiques.jsonl")
    assert revisions["id"][:] == [row["id"] for row in finished.rows("revise/revisions.jsonl")]
    prompts = [row["prompt_id"] for row in finished.rows("revise/revisions.jsonl")]
    assert [[each["revision"] for each in rounds] for rounds in revisions["rounds"]] == [
        [each["revision"] for each in made if each["prompt_id"] == prompt] for prompt in prompts
    ]


def test_the_test_split_is_what_the_reward_model_was_tested_on(finished: Run, data: dict[str, DatasetDict]) -> None:
    held_out = {row["id"] for row in finished.rows("reward/held_out.jsonl")}
    assert set(data["preferences"]["test"]["id"]) == held_out
    assert data["sft"].keys() == data["revisions"].keys() == {"train"}


def test_a_single_row_records_how_it_was_made(finished: Run, data: dict[str, DatasetDict]) -> None:
    weights = finished.manifest("sft")["outputs"]["model/model.safetensors"]
    constitution = finished.manifest("compare")["settings"]["constitution"]
    for row in data["preferences"]["train"]:
        for side in ("chosen_provenance", "rejected_provenance"):
            made = row[side]
            assert (made["engine"], made["model"], made["verified"]) == ("local", "sft/model", True)
            assert made["model_digest"] == weights, "the weights that the run's own sft published"
            assert (made["temperature"], made["top_p"], made["max_new_tokens"]) == (1.0, 1.0, 8)
            assert made["recipe_seed"] == 5 and made["seed"] is not None
        assert row["chosen_provenance"]["seed"] != row["rejected_provenance"]["seed"]
        judge = row["judge_provenance"]
        assert (judge["engine"], judge["constitution_digest"]) == ("rule", constitution["digest"])
        assert row["judged_by"] == ["has-e"]
    for row in data["sft"]["train"]:
        step = {"revision": "revision", "own": "completion"}[row["source"]]
        assert row["provenance"]["step"] == step and len(row["provenance"]["model_digest"]) == 64
        assert bool(row["revised_by"]) == (row["source"] == "revision")
    assert any(len(row["revised_by"]) < len(row["rounds"]) for row in data["revisions"]["train"])
    for row in data["revisions"]["train"]:
        rounds = row["rounds"]
        before = [each["completion"] for each in rounds]
        after = [*before[1:], row["completion"][0]["content"]]
        changed = [each["principle"] for each, one, two in zip(rounds, before, after, strict=True) if one != two]
        assert row["revised_by"] == changed, "a round whose revision was rejected is not in revised_by"


def test_the_card_reports_models_constitution_counts_and_versions(finished: Run, exported: Path) -> None:
    card = DatasetCard.load(exported / "README.md")
    assert [each["config_name"] for each in card.data.configs] == list(SETS)
    assert (card.data.language, card.data.license, card.data.size_categories) == (["en"], "unknown", ["n<1K"])
    revise, compare = finished.manifest("revise"), finished.manifest("compare")
    told = [
        finished.manifest("sft")["outputs"]["model/model.safetensors"],
        compare["settings"]["constitution"]["digest"],
        "text: Use the letter e.",
        f"| `revise` | rejected: cut | {revise['counts']['rejected: cut']} |",
        f"| `compare` | comparisons | {compare['counts']['comparisons']} |",
        f"| `revise` | `cut` | {revise['figures']['gates']['cut']['share']:.1%} |",
        "| prompts.jsonl | prompts | 96 | unknown |",
        revise["environment"]["trl"],
    ]
    assert [each for each in told if each not in card.text] == []
    assert str(finished.root) not in (exported / "README.md").read_text()


@pytest.mark.parametrize("name", ["preferences", "sft", "revisions"])
def test_trl_takes_the_rows_for_conversations(data: dict[str, DatasetDict], name: str) -> None:
    assert is_conversational(data[name]["train"][0])


def test_trl_trains_on_them(data: dict[str, DatasetDict], finished: Run, tmp_path: Path) -> None:
    """On the rows as they are loaded, with all provenance columns."""
    from transformers import AutoModelForSequenceClassification
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    model = str(finished.root / "models/tiny")
    options: dict[str, Any] = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}

    def losses(kind: Any, config: Any, name: str, of: Any = model) -> list[float]:
        args = config(output_dir=str(tmp_path / name), per_device_train_batch_size=2, logging_steps=1, **options)
        trainer = kind(model=of, args=args, train_dataset=data[name]["train"])
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    for found in (
        losses(DPOTrainer, DPOConfig, "preferences"),
        losses(RewardTrainer, RewardConfig, "preferences", scorer),
        losses(SFTTrainer, SFTConfig, "sft"),
        losses(SFTTrainer, SFTConfig, "revisions"),
    ):
        assert found and all(loss > 0 for loss in found)


def test_the_same_run_gives_the_same_bytes_again_and_others_files_stay(
    finished: Run, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "again"
    shutil.copytree(exported, again)
    (again / "notes.txt").write_text("mine")
    command = ("export", str(finished.own), "--output", str(again), "--overwrite")
    assert in_process(finished.root, monkeypatch, *command) == 0
    kept = {path.relative_to(exported): path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    made = {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()}
    assert made == {**kept, Path("notes.txt"): b"mine"}
    assert in_process(finished.root, monkeypatch, *command, "--what", "sft") == 0
    assert [path.name for path in (again / "data").iterdir()] == ["sft-train.parquet"]


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    return finished.copy(tmp_path / "copy")


def test_what_cannot_be_exported_is_reported_before_anything_is_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"

    def told(folder: Path, *words: str, to: Path = output) -> str:
        assert in_process(run.root, monkeypatch, "export", str(folder), "--output", str(to), *words) == 2
        return capsys.readouterr().err

    assert "no such folder" in told(run.root / "gone")
    assert f"not a run, since no stage is done in it; it contains the runs {run.own.name}: name one" in told(
        run.own.parent
    )
    assert f"it is the folder of one stage: name {run.own}" in told(run.own / "sft")
    assert "not empty; name another folder with --output, or add --overwrite" in told(run.own, to=run.root)
    assert "is a file" in told(run.own, to=run.root / "tiny.yaml")
    other = run.root / "other.yaml"
    other.write_text((run.root / "letter.yaml").read_text().replace("letter e", "letter i"))
    assert "used another; name its own" in told(run.own, "--constitution", str(other))
    with (run.own / "compare/pairs.jsonl").open("a") as file:
        file.write("\n")
    assert "has changed since `compare` wrote it" in told(run.own)
    with (run.own / "sft/provenance.jsonl").open("a") as file:
        file.write("\n")
    assert "provenance.jsonl: has changed since `sft` wrote it" in told(run.own, "--what", "sft")
    shutil.rmtree(run.own / "compare")
    assert "`compare` is not done in this run; finish it with `align run RECIPE`" in told(
        run.own, "--what", "preferences"
    )
    assert not output.exists() and not list(tmp_path.glob(".out*"))


def rerun_with_another_result(folder: Path, file: str) -> None:
    """Change a stage's output and its manifest, as if the stage had run again with another result."""
    with (folder / file).open("a") as rows_file:
        rows_file.write("\n")
    record_output(folder, file)


def forget_output(folder: Path, file: str) -> None:
    """Remove a file from a stage's manifest, as if a version that did not write it had run."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["outputs"][file]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def record_output(folder: Path, file: str) -> None:
    """Record the present digest of a file in the stage's manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["outputs"][file] = file_digest(folder / file)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("stage", "file"),
    [("sample", "samples.jsonl"), ("revise", "revisions.jsonl"), ("sft", "metrics.jsonl"), ("compare", "pairs.jsonl")],
)
def test_rows_of_stages_that_do_not_belong_together_are_not_joined(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    file: str,
) -> None:
    rerun_with_another_result(run.shared / stage if stage == "sample" else run.own / stage, file)
    output = tmp_path / "out"
    words = ("export", str(run.own), "--output", str(output), "--what", "preferences")
    assert in_process(run.root, monkeypatch, *words) == 2
    told = capsys.readouterr().err
    assert "made from another `" in told and f"`{stage}` than" in told
    assert not output.exists()


def test_a_later_stage_that_was_rerun_does_not_affect_earlier_rows(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rerun_with_another_result(run.own / "revise", "revisions.jsonl")
    words = ("export", str(run.own), "--output", str(tmp_path / "out"), "--what", "revisions")
    assert in_process(run.root, monkeypatch, *words) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "| `revise` |" in card and "| `sft` |" not in card and "`compare`" not in card


def test_a_run_of_an_earlier_version_is_exported_without_provenance(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a run has no provenance, neither in rows nor in files."""
    kept = {"id", "prompt", "chosen", "rejected", "probability", "source", "category"}
    pairs = run.own / "compare/pairs.jsonl"
    old = [{key: row[key] for key in kept} for row in rows(pairs)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in old))
    (run.own / "compare/provenance.jsonl").unlink()
    record_output(run.own / "compare", "pairs.jsonl")
    forget_output(run.own / "compare", "provenance.jsonl")
    shutil.rmtree(run.own / "reward")
    output = tmp_path / "out"
    assert (
        in_process(run.root, monkeypatch, "export", str(run.own), "--output", str(output), "--what", "preferences") == 0
    )
    loaded = load_dataset(str(output), cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded["chosen_provenance"][:] == [None] * len(loaded)


def test_relabelled_pairs_are_exported_by_themselves(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again, output = tmp_path / "again", tmp_path / "out"
    words = ("relabel", str(run.own), "--output", str(again), "--set", "judge.clamp=0.3")
    assert in_process(run.root, monkeypatch, *words) == 0
    assert in_process(run.root, monkeypatch, "export", str(again), "--output", str(output)) == 0
    data = load_dataset(str(output), cache_dir=str(tmp_path / "cache"))
    assert data.keys() == {"train"}, "without a reward stage there is no test split"
    made = rows(again / "pairs.jsonl")
    judged = [row["probability"] for row in made if row["source"] != "revision"]
    assert judged and max(judged) <= 0.7
    assert data["train"]["probability"][:] == [row["probability"] for row in made]
    labels = [each for row in data["train"] if (each := row["judge_provenance"]) and each["stage"] == "compare"]
    assert labels and all(json.loads(each["settings"])["clamp"] == 0.3 for each in labels)
    card = DatasetCard.load(output / "README.md").content
    assert "recomputed by `align relabel`" in card and "| source |" not in card
    assert "\n# again\n" in card and tmp_path.name not in card, "the parent folder may contain a user name"
    capsys.readouterr()
    words = ("export", str(again), "--output", str(tmp_path / "sft"), "--what", "sft")
    assert in_process(run.root, monkeypatch, *words) == 2
    assert "no rows of `sft`; export their run instead" in capsys.readouterr().err
