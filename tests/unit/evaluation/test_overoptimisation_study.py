"""Studies of runs written by the tests: the curves, the tables and files, and what is refused."""

import io
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.cli.overoptimisation import print_study
from align.errors import InputError
from align.evaluation.overoptimisation_study import load_study
from align.evaluation.report import EvaluatedSample
from align.records import Message, write_rows
from align.run.artefacts import Manifest, write_json

GOLD_CODE = """
def length(prompts, completions):
    return [len(text) for text in completions]

def flat(prompts, completions):
    return [1 for text in completions]
"""
STAGE = {"stage": "reward", "model": None, "function": None, "gold": False, "weight": 1.0}
LENGTH = {"stage": None, "model": None, "function": "gold_of_test:length", "gold": True, "weight": 1.0}
FLAT = LENGTH | {"function": "gold_of_test:flat"}
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8}
CANDIDATES = {
    "p0": {"a": 0.0, "bbb": 1.0, "cc": 2.0},
    "p1": {"dddd": 5.0, "e": 4.0, "ff": 3.0},
    "p2": {"g": 1.0, "h": 2.0, "ii": 0.0},
}
"""The proxy score of each completion of each prompt. The gold score is its length."""
ROLLOUTS = [
    (1, "r0", 1.0, 2.0, 0.0), (1, "r1", 3.0, 4.0, 0.0), (1, "r2", 2.0, 3.0, 0.0),
    (2, "r0", 4.0, 5.0, 1.0), (2, "r1", 6.0, 7.0, 1.5), (2, "r2", 5.0, 6.0, 0.5),
    (3, "r0", 8.0, 1.0, 4.0), (3, "r1", 9.0, 2.0, 4.0), (3, "r2", 7.0, 3.0, 4.0),
]  # fmt: skip
"""Iteration, prompt, proxy, gold, KL."""


def manifest(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    whole = {"stage": stage, "seed": 0, "settings": dict(settings), "model": {"path": "tiny", "precision": "fp32"}}
    return Manifest(stage, "f", whole, dict(inputs), {}).__dict__


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "gold_of_test.py").write_text(GOLD_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "gold_of_test", raising=False)
    return tmp_path


def write_run(run: Path, rewards: Any = (STAGE, LENGTH), candidates: Any = CANDIDATES, **changes: Any) -> Path:
    """A run with a finished ppo and a finished evaluate."""
    inputs = {"sft": "one", "reward": "two"}
    optimizer = {"micro_batch_size": 2}
    written = {
        "ppo": manifest("ppo", {"rewards": list(rewards), "sampling": SAMPLING, "optimizer": optimizer}, inputs),
        "evaluate": manifest(
            "evaluate", {"sampling": changes.get("sampling", SAMPLING)}, inputs | changes.get("inputs", {})
        ),
    }
    for stage, content in written.items():
        (run / stage).mkdir(parents=True)
        write_json(run / stage / "manifest.json", content)
    rows = [
        EvaluatedSample(
            id=f"{prompt}/{number}", prompt_id=prompt, prompt=(Message("user", "Hi"),), category="", policy="sft",
            completion=completion, finish_reason="stop", tokens=2, score=score,
        )
        for prompt, scores in candidates.items()
        for number, (completion, score) in enumerate(scores.items())
    ]  # fmt: skip
    write_rows(run / "evaluate" / "best_of.jsonl", rows)
    with (run / "ppo" / "rollouts.jsonl").open("w") as out:
        for iteration, prompt, proxy, gold, kl in changes.get("rollouts", ROLLOUTS):
            scores = {"reward": proxy, "length": gold}
            row = {"iteration": iteration, "prompt_id": prompt, "scores": scores, "kl_to_reference_k1": kl}
            out.write(json.dumps(row) + "\n")
    return run


def test_curves_worked_by_hand(tmp_path):
    study = load_study(write_run(tmp_path / "style-1"), resamples=20)
    assert (study.run, study.proxy, study.gold) == (f"{tmp_path.name}/style-1", "reward", "length")
    assert (study.prompts, study.candidates) == (3, 3)
    lengths = [1, 3, 2, 4, 1, 2, 1, 1, 2]
    mean = sum(lengths) / 9
    std = math.sqrt(sum((length - mean) ** 2 for length in lengths) / 9)
    assert study.sft["gold"].mean == pytest.approx(mean)
    assert study.sft["gold"].std == pytest.approx(std)
    assert study.sft["proxy"].mean == pytest.approx(2)
    best, ppo = study.curves
    assert best.steps == (1, 2, 3)
    assert best.points.kl.tolist() == pytest.approx([0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])
    # The best of all three: "cc", "dddd" and "h". Of two: the first wins two of the three pairs, the next the third.
    assert best.points.gold[2] * std + mean == pytest.approx((2 + 4 + 1) / 3)
    assert best.points.gold[1] * std + mean == pytest.approx(((2 + 2 + 3) / 3 + (4 + 4 + 1) / 3 + (1 + 1 + 1) / 3) / 3)
    assert ppo.steps == (1, 2, 3)
    assert ppo.points.kl.tolist() == [0, 1, 4]
    assert ppo.points.gold == pytest.approx([0, (6 - 3) / std, (2 - 3) / std])
    assert ppo.points.d.tolist() == [0, 1, 2]
    # Two points away from the start, two coefficients: R(1) = α, R(2) = 2 (α − β log 2).
    alpha = ppo.fits["gold"].alpha.value
    assert alpha == pytest.approx(3 / std)
    assert 2 * (alpha - ppo.fits["gold"].beta.value * math.log(2)) == pytest.approx(-1 / std)
    assert ppo.fits["gold"].r_squared == pytest.approx(1)


def shown(run: Path, **options: Any) -> str:
    output = io.StringIO()
    print_study(run, console=Console(file=output, width=120), **options)
    return output.getvalue()


def test_tables_and_json_agree(tmp_path):
    run = write_run(tmp_path / "run")
    text = shown(run, with_plot=False)
    study = json.loads((run / "overoptimisation.json").read_text())
    assert f"wrote {run / 'overoptimisation.json'}" in text
    fit = study["curves"]["ppo"]["fits"]["gold"]
    for number in (
        fit["alpha"]["value"],
        fit["beta"]["value"],
        fit["peak"],
        study["curves"]["ppo"]["points"][2]["gold"],
    ):
        assert f"{number:.2f}" in text
    assert "Gold is highest at iteration 2 (d 1.00)" in text
    assert not (run / "overoptimisation.svg").exists()


def test_the_same_run_gives_the_same_files(tmp_path):
    pytest.importorskip("matplotlib")
    files = []
    for name in ("one", "two"):
        run = write_run(tmp_path / name / "run")
        shown(run)
        files.append([(run / f"overoptimisation.{kind}").read_bytes() for kind in ("svg", "json")])
    (svg, study), (svg_again, study_again) = files
    assert svg == svg_again
    assert json.loads(study)["curves"] == json.loads(study_again)["curves"]


@pytest.mark.parametrize(("name", "begins"), [("p.svg", b"<?xml"), ("p.png", b"\x89PNG")])
def test_the_plot_is_in_the_format_that_its_name_says(tmp_path, name, begins):
    pytest.importorskip("matplotlib")
    shown(write_run(tmp_path / "run"), plot=tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(begins)
    assert len(content) < 100_000
    assert name == "p.png" or b"best-of-n" in content


@pytest.mark.parametrize("name", ["p.nonsense", "no-such-folder/p.svg"])
def test_a_plot_that_cannot_be_written_names_the_option_for_another_place(tmp_path, name):
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match="choose another place with --plot"):
        shown(write_run(tmp_path / "run"), plot=tmp_path / name)


def test_without_matplotlib_the_extra_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = write_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"pip install 'align-rlhf\[plots\]'; or leave it out with --no-plot"):
        shown(run)
    assert not (run / "overoptimisation.json").exists()
    assert "fits" in shown(run, with_plot=False)


@pytest.mark.parametrize(
    ("rewards", "gold", "fault"),
    [
        ((STAGE,), None, "no gold source"),
        (
            (LENGTH | {"gold": False}, FLAT),
            None,
            "trained against length, but best-of-n chooses by the reward stage",
        ),
        ((STAGE, FLAT | {"gold": False}, LENGTH), None, "trained against reward, flat, but"),
        ((STAGE, LENGTH, FLAT), None, "--gold: name one of the gold sources: length, flat"),
        ((STAGE, LENGTH), "breadth", "--gold: name one of the gold sources: length"),
        ((STAGE, {"judge": "direct", "gold": True}), None, "the gold source judge is the recipe's judge, which this"),
        ((STAGE, FLAT), None, "the gold reward gives every completion of the SFT policy the same score"),
    ],
)
def test_unsuitable_sources_are_refused(tmp_path, rewards, gold, fault):
    with pytest.raises(InputError, match=fault):
        load_study(write_run(tmp_path / "run", rewards), gold, resamples=5)


def test_one_of_several_gold_sources_is_chosen_by_name(tmp_path):
    run = write_run(tmp_path / "run", (STAGE, FLAT, LENGTH))
    assert load_study(run, "length", resamples=5).gold == "length"


def test_too_few_candidates_or_iterations_are_refused_with_a_remedy(tmp_path):
    few = {prompt: dict(list(scores.items())[:2]) for prompt, scores in CANDIDATES.items()}
    with pytest.raises(
        InputError, match=r"2 completions per prompt are too few for a curve; set `evaluate\.best_of` to 3 or more"
    ):
        load_study(write_run(tmp_path / "few", candidates=few))
    with pytest.raises(InputError, match=r"ppo: a curve needs two or more points away.*train for longer"):
        load_study(write_run(tmp_path / "short", rollouts=ROLLOUTS[:6]), resamples=5)


def test_missing_results_are_reported_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        load_study(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"ppo: not finished; run its recipe with `align run`"):
        load_study(tmp_path / "empty")
    run = write_run(tmp_path / "run")
    (run / "evaluate" / "best_of.jsonl").unlink()
    with pytest.raises(InputError, match=r"best_of\.jsonl: no such file; set `evaluate\.best_of`"):
        load_study(run)


def test_stages_that_used_different_models_are_not_compared(tmp_path):
    with pytest.raises(InputError, match="ppo and evaluate used different outputs of `reward`"):
        load_study(write_run(tmp_path / "run", inputs={"reward": "three"}))


def test_different_sampling_is_reported(tmp_path):
    run = write_run(tmp_path / "run", sampling=SAMPLING | {"temperature": 0.5})
    assert "different temperature, so the curves start apart" in shown(run, with_plot=False)
