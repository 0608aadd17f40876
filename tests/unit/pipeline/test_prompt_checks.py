"""What a recipe's stages would find too late is told as it is read."""

import os
from pathlib import Path

import pytest

from align.errors import InputError
from align.pipeline.recipe import load_recipe
from tests.unit.pipeline.test_recipe import CONSTITUTION, RECIPE, faults, write

PROBE = "      - {prompt: Why?, better: So., worse: So!}\n"
ALL_SFT = "prompts.split={sft: 1, preference: 0, rl: 0, eval: 0}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(CONSTITUTION, "small.yaml")
    write('{"prompt": "Why?", "category": "weapons"}\n', "prompts.jsonl")
    write(RECIPE)


@pytest.mark.parametrize("seed", [2**63, 2**64, 10**30])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    assert faults("recipe.yaml", f"seed={seed}")[1] == f"--set seed: must be below {2**63}, got {seed}"
    assert load_recipe("recipe.yaml", [f"seed={2**63 - 1}"]).seed == 2**63 - 1


@pytest.mark.parametrize(("line", "key"), [("1: 2", "1"), ("true: 2", "true"), ("dpo: {1: 2}", "dpo.1")])
def test_a_key_that_is_no_text_is_an_unknown_key(line: str, key: str) -> None:
    told = faults(write(RECIPE + line + "\n"))
    assert told[0] == "recipe.yaml: 1 problem"
    assert f"{key}: no such setting; there are: " in told[1]


def test_a_recipe_without_stages_is_refused() -> None:
    assert faults(write("seed: 1\n"))[1].startswith("has no stage to run; add one: compare, dpo")
    assert "no stage" not in "\n".join(faults(write("dpo: {bta: 1}\n")))


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("small.yaml", "it is a file; give the folder that `save_pretrained` wrote"),
        ("empty", "the folder has no config.json"),
        ("wheel:no-such-package", "no such Python package is installed; install it with `pip install no-such-package`"),
        ("wheel:pytest", "the package contains 0 .gguf files"),
    ],
)
def test_what_holds_no_model_is_told_wherever_a_model_is_named(path: str, told: str) -> None:
    Path("empty").mkdir()
    for key in ("model.path", "judge.engine.model"):
        [_, said] = faults("recipe.yaml", f"{key}={path}")
        assert said.startswith(f"--set {key}: {path}: {told}")


def test_a_folder_or_a_pipe_is_no_source_of_prompts() -> None:
    Path("folder.jsonl").mkdir()
    os.mkfifo("pipe.jsonl")
    for path, told in {"folder.jsonl": "is a folder", "pipe.jsonl": "is a pipe", "small.yaml": "this kind"}.items():
        [_, said] = faults("recipe.yaml", f"prompts.sources.0.path={path}")
        assert said.startswith(f"--set prompts.sources[0].path: {path}: ") and told in said


@pytest.mark.parametrize(("probes", "enough"), [(0, False), (3, False), (4, True)])
def test_a_judge_that_its_probes_could_never_clear_of_chance_is_refused(probes: int, enough: bool) -> None:
    write(CONSTITUTION + ("    probes:\n" + PROBE * probes if probes else ""), "small.yaml")
    if enough:
        assert load_recipe("recipe.yaml", ["judge.kind=choice"])
        return
    assert f"has {probes} probes for that, too few" in faults("recipe.yaml", "judge.kind=choice")[1]
    assert load_recipe("recipe.yaml", ["judge.kind=choice", "judge.allow_chance=true"])


def test_the_least_number_of_probes_is_the_one_from_which_the_interval_excludes_chance() -> None:
    from align.feedback.judge import LEAST_PROBES
    from align.figures.statistics import wilson_interval

    assert [wilson_interval(n, n)[0] > 0.5 for n in (LEAST_PROBES - 1, LEAST_PROBES)] == [False, True]


def test_a_split_that_a_stage_reads_and_no_prompt_can_fall_into_is_told() -> None:
    told = faults("recipe.yaml", ALL_SFT)
    assert told[1].startswith("--set prompts.split.preference: `compare` reads this split, and no prompt can fall")
    assert len(told) == 2
    write('{"prompt": "Why?", "split": "preference"}\n', "prompts.jsonl")
    assert load_recipe("recipe.yaml", [ALL_SFT]), "the row says itself where it belongs"


def test_where_only_a_hub_could_tell_the_splits_nothing_is_refused() -> None:
    assert load_recipe("recipe.yaml", [ALL_SFT, "prompts.sources.0.path=org/prompts"])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["sample.splits=[rl]"],
            "revise.splits: no prompt of the split 'sft' is completed; name it in",
        ),
        (["revise.splits=[preference]"], "sft.revisions: no sample of the split 'sft' is revised"),
        (["compare.revision_pairs=true"], "compare.revision_pairs: no sample of the split 'preference' is revised"),
    ],
)
def test_splits_that_do_not_reach_the_stage_after_are_told(overrides: list[str], told: str) -> None:
    assert any(told in line for line in faults("recipe.yaml", *overrides))


@pytest.mark.parametrize(
    ("applies", "told"),
    [("wepons", True), ("weapons", False), ("gardening", False), ("weapons, wepons", False)],
)
def test_a_category_that_is_nearly_one_of_the_prompts_is_told(applies: str, told: bool) -> None:
    write(CONSTITUTION + f"    applies: [{applies}]\n", "small.yaml")
    if told:
        fault = "principle 'calm' applies to 'wepons', a category that no prompt has; did you mean `weapons`?"
        assert faults("recipe.yaml")[1] == f"line 5  constitution: {fault}"
    else:
        assert load_recipe("recipe.yaml")


def test_a_category_is_left_alone_where_the_prompts_are_not_known() -> None:
    write(CONSTITUTION + "    applies: [wepons]\n", "small.yaml")
    assert load_recipe("recipe.yaml", ["prompts.sources=[{path: prompts.jsonl}, {path: org/prompts}]"])


def test_the_commands_that_are_told_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    from align.__main__ import main

    Path("my recipe.yaml").write_text(RECIPE)
    override = 'model.system_prompt=it\'s a "test"'
    assert main(["plan", "my recipe.yaml", "--set", override]) == 0
    [following] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: ")]
    words = shlex.split(following.removeprefix("Next: "))
    assert words == ["align", "run", "sample", "--recipe", "my recipe.yaml", "--set", override]


def test_inputs_that_are_not_made_yet_are_told_with_a_command_that_can_be_pasted() -> None:
    from align.pipeline.runner import run_stage

    with pytest.raises(InputError, match=r"`align run recipe.yaml --set 'sample.sampling.top_p= 0.5'`"):
        run_stage(load_recipe("recipe.yaml", ["sample.sampling.top_p= 0.5"]), "revise")
