"""The whole pipeline by the real command: run twice, in two processes, by another constitution, and given nonsense."""

import json
import shutil
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.pipeline import CONSTITUTION, Run, in_process, weights
from tests.tiny import build_tiny_model

STAGES = ("sample", "revise", "sft", "compare", "dpo", "reward", "ppo", "evaluate")


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    return finished.copy(tmp_path / "copy")


def ran(printed: str) -> list[str]:
    """The stages that a command ran, by what it printed."""
    return [line.split(":")[0] for line in printed.splitlines() if ": done in" in line]


def test_a_recipe_runs_from_prompts_to_a_report(finished: Run) -> None:
    for stage in STAGES:
        manifest = finished.manifest(stage)
        assert manifest["outputs"] and manifest["processes"] == 1
        assert all((finished.stage(stage) / name).exists() for name in manifest["outputs"])
    prompts = finished.rows("sample/prompts.jsonl")
    assert len(prompts) == 96 and len({row["id"] for row in prompts}) == 96
    report = json.loads((finished.stage("evaluate") / "report.json").read_text())
    evaluated = {row["id"] for row in prompts if row["split"] == "eval"}
    assert Counter(row["policy"] for row in finished.rows("evaluate/samples.jsonl")) == {
        policy: len(evaluated) for policy in ("base", "sft", "ppo", "best-of-4")
    }
    assert {row["prompt_id"] for row in finished.rows("evaluate/samples.jsonl")} == evaluated
    assert report


def test_what_one_stage_learns_from_is_what_the_one_before_made(finished: Run) -> None:
    split = {row["id"]: row["split"] for row in finished.rows("sample/prompts.jsonl")}
    samples = finished.rows("sample/samples.jsonl")
    assert {split[row["prompt_id"]] for row in samples} == {"sft"}
    judged = finished.rows("revise/revisions.jsonl") + finished.rows("revise/rejected.jsonl")
    assert sorted(row["prompt_id"] for row in judged) == sorted(row["prompt_id"] for row in samples)
    assert all(
        "e" in row["completion"] and "e" not in row["original"] for row in finished.rows("revise/revisions.jsonl")
    )
    assert {split[row["prompt_id"]] for row in finished.rows("compare/comparisons.jsonl")} == {"preference"}
    pairs = finished.rows("compare/pairs.jsonl")
    assert pairs
    for row in pairs:
        assert "e" in row["chosen"][-1]["content"].casefold() and "e" not in row["rejected"][-1]["content"].casefold()
    assert {split[row["prompt_id"]] for row in finished.rows("ppo/rollouts.jsonl")} == {"rl"}


def test_a_finished_run_tells_of_over_optimisation(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_process(run.root, monkeypatch, "overoptimisation", str(run.own), "--no-plot") == 0
    study = json.loads((run.own / "overoptimisation.json").read_text())
    best, ppo = (study["curves"][name] for name in ("best-of-n", "ppo"))
    assert study["rewards"] == {"proxy": "reward", "gold": "letters"}
    assert [point["n"] for point in best["points"]] == [1, 2, 4]
    assert [point["iteration"] for point in ppo["points"]] == [1, 2, 3, 4]
    # The rows of each, counted here: best-of-4 has the highest score of each prompt, best-of-1 the mean of all.
    drawn = run.rows("evaluate/best_of.jsonl")
    scores = [row["score"] for row in drawn]
    highest = [
        max(row["score"] for row in drawn if row["prompt_id"] == prompt)
        for prompt in {row["prompt_id"] for row in drawn}
    ]
    spread = statistics.pstdev(scores)
    gain = (statistics.mean(highest) - statistics.mean(scores)) / spread
    assert best["points"][2]["proxy"] == pytest.approx(gain)
    rollouts = run.rows("ppo/rollouts.jsonl")
    first, last = (
        statistics.mean(len([c for c in row["completion"] if c.isalpha()]) for row in rollouts if row["iteration"] == i)
        for i in (1, 4)
    )
    assert ppo["points"][3]["gold"] == pytest.approx((last - first) / study["sft"]["gold"]["std"])


def test_a_second_run_does_nothing(run: Run) -> None:
    before = {stage: run.manifest(stage) for stage in STAGES}
    start = time.monotonic()
    printed = run.make("run", "tiny.yaml")
    assert ran(printed) == []
    assert all(f"{stage}: up to date" in printed for stage in STAGES)
    assert time.monotonic() - start < 20
    assert {stage: run.manifest(stage) for stage in STAGES} == before


def test_two_processes_make_the_same_bytes_as_one(finished: Run, tmp_path: Path) -> None:
    """The training stages between them stay up to date, which they would not after an input that differs."""
    made = ("revise", "compare", "evaluate")
    run = finished.copy(tmp_path / "copy", without=made)
    printed = run.make("run", "tiny.yaml", "--nproc", "2", "--force")
    assert ran(printed) == list(made)
    for stage in made:
        assert run.manifest(stage)["processes"] == 2
    for stage in ("revise", "compare"):
        assert run.manifest(stage)["outputs"] == finished.manifest(stage)["outputs"]
    one, two = (each.rows("evaluate/samples.jsonl") for each in (finished, run))
    assert [texts(row) for row in one] == [texts(row) for row in two]


def test_two_processes_train_what_one_does(finished: Run, tmp_path: Path) -> None:
    """Every step on the same rows, so that weights differ by the rounding of sums alone."""
    run = finished.copy(tmp_path / "copy")
    for stage, batch_size in (("dpo", 8), ("reward", 2), ("sft", 2)):
        change = ("--set", f"{stage}.optimizer.micro_batch_size={batch_size // 2}")
        printed = run.make("launch", stage, "--recipe", "tiny.yaml", "--nproc", "2", *change, "--force")
        assert ran(printed) == [stage]
        assert run.manifest(stage)["processes"] == 2
        for one, two in zip(losses(finished, stage), losses(run, stage), strict=True):
            assert two == pytest.approx(one, rel=1e-3, abs=1e-5), stage
        trained = finished.root / "models/tiny" if stage == "sft" else finished.stage("sft") / "model"
        before, one, two = map(weights, (trained, finished.stage(stage) / "model", run.stage(stage) / "model"))
        apart = max(float((one[name] - two[name]).abs().max()) for name in one)
        moved = max(float((one[name] - before[name]).abs().max()) for name in one if name in before)
        assert apart < 0.01 * moved, stage


def losses(run: Run, stage: str) -> list[float]:
    return [row["loss"] for row in run.rows(f"{stage}/metrics.jsonl") if "loss" in row]


def texts(row: dict[str, Any]) -> dict[str, Any]:
    """An evaluated sample without the figures that a model's pass over another batch rounds otherwise."""
    return {name: value for name, value in row.items() if not isinstance(value, float)}


def test_another_constitution_shares_the_samples_and_lives_beside(finished: Run, run: Run) -> None:
    (run.root / "other.yaml").write_text(CONSTITUTION.format(letter="o"))
    before = {stage: finished.manifest(stage) for stage in STAGES}
    printed = run.make("run", "revise", "--recipe", "tiny.yaml", "--constitution", "other.yaml")
    assert ran(printed) == ["revise"]
    assert {stage: run.manifest(stage) for stage in STAGES} == before
    [other] = (run.root / "runs/tiny").glob("other-*")
    made = json.loads((other / "revise/manifest.json").read_text())
    assert made["inputs"] == before["revise"]["inputs"]
    assert made["outputs"] != before["revise"]["outputs"]
    assert sorted(path.name.partition("-")[0] for path in (run.root / "runs/tiny").iterdir()) == [
        "letter",
        "other",
        "shared",
    ]


def test_a_process_that_is_killed_ends_the_run_at_once(finished: Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "copy", without=["ppo"])
    process = run.start("launch", "ppo", "--recipe", "tiny.yaml", "--nproc", "2", "--set", "ppo.iterations=100000")
    try:
        wait_until(lambda: any(path.stat().st_size for path in run.own.glob(".partial/ppo-*/rollouts.jsonl")))
        family = psutil.Process(process.pid).children(recursive=True)
        [victim] = (each for each in family if each.environ().get("RANK") == "1")
        victim.kill()
        start = time.monotonic()
        process.communicate(timeout=60)
        assert time.monotonic() - start < 30
        assert process.returncode not in (0, None)
        assert psutil.wait_procs(family, timeout=10)[1] == [], "none outlives the run"
        assert not run.stage("ppo").exists()
    finally:
        process.kill()


def wait_until(moment: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not moment():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def refusal(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error that the command prints for a wrong input. It leaves no result, not even part of one."""
    capsys.readouterr()
    options = ("--set", "output=out", *words)
    assert in_process(run.root, monkeypatch, "run", "sample", "--recipe", "tiny.yaml", *options) == 2
    assert not list((run.root / "out").glob("**/manifest.json"))
    assert not [path for path in (run.root / "out").glob("**/*.jsonl") if ".partial" not in path.parts], "published"
    assert not list((run.root / "out").glob("tiny/*/sample"))
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ("", ["bad.jsonl: no rows in it"]),
        ('{"prompt": "One?"}\n{"prompt": "Two?"}\n{"prompt": "Thr\n', ["bad.jsonl", "line 3"]),
        ('{"text": "One?", "topic": "numbers"}\n', ["bad.jsonl, line 1: no column with a prompt", "text, topic"]),
        ('{"prompt": "One?"}\n{"prompt": "  "}\n', ["bad.jsonl, line 2: the prompt is empty"]),
    ],
)
def test_prompts_that_cannot_be_used_are_reported(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
    messages: list[str],
) -> None:
    (run.root / "bad.jsonl").write_text(content)
    error = refusal(run, monkeypatch, capsys, "--set", "prompts.sources=[{path: bad.jsonl}]")
    assert all(text in error for text in messages), error


def test_a_model_that_cannot_be_used_is_reported(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weightless = run.root / "models/weightless"
    shutil.copytree(run.root / "models/tiny", weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    error = refusal(run, monkeypatch, capsys, "--set", "model.path=models/weightless")
    assert "model.path: models/weightless: the folder has no weights (*.safetensors)" in error

    wordless = build_tiny_model(run.root / "models/wordless")
    (wordless / "chat_template.jinja").unlink()
    error = refusal(run, monkeypatch, capsys, "--set", "model.path=models/wordless")
    assert "models/wordless: its tokenizer has no chat template" in error

    error = refusal(run, monkeypatch, capsys, "--set", "model.path=nobody/nothing")
    assert "model nobody/nothing: no such folder" in error and "HF_HUB_OFFLINE is set" in error


def test_the_real_command_ends_with_2_and_one_message(run: Run) -> None:
    (run.root / "bad.jsonl").write_text("")
    done = run.align("run", "tiny.yaml", "--set", "output=out", "--set", "prompts.sources=[{path: bad.jsonl}]")
    assert done.returncode == 2
    assert "bad.jsonl: no rows in it" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((run.root / "out").glob("**/manifest.json"))


def test_an_output_that_cannot_be_written_is_reported_before_anything_runs(run: Run) -> None:
    """A folder below a file: even root cannot make it."""
    done = run.align("run", "sample", "--recipe", "tiny.yaml", "--set", "output=prompts.jsonl/runs")
    assert done.returncode == 2
    assert "prompts.jsonl/runs" in done.stderr and "choose another place" in done.stderr
    assert "Traceback" not in done.stderr
