"""What a recipe means, and how a faulty one is reported."""

from pathlib import Path

import pytest

from align.errors import FileProblems, InputError
from align.pipeline.recipe import Recipe, load_recipe

CONSTITUTION = """\
title: Small
principles:
  - id: calm
    text: Be calm.
    opposite: Be loud.
    rule: {excludes: "!"}
"""
RECIPE = """\
model: {path: org/model}
prompts:
  sources:
    - path: prompts.jsonl
constitution: small.yaml
judge: {kind: rule}
sample: {}
revise: {}
sft: {helpful: {harmless: [prompts.jsonl]}}
compare: {}
reward: {}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(CONSTITUTION)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def faults(path: str, *overrides: str) -> list[str]:
    """The lines after the first of the report on a faulty recipe."""
    with pytest.raises(InputError) as raised:
        load_recipe(path, overrides)
    assert raised.value.exit_code == 2
    return [line.strip() for line in str(raised.value).splitlines()]


def write(text: str, name: str = "recipe.yaml") -> str:
    Path(name).write_text(text)
    return name


def test_a_recipe_has_its_stages_in_the_order_they_run() -> None:
    assert list(load_recipe("recipe.yaml").settings) == ["sample", "revise", "sft", "compare", "reward"]


def test_the_name_is_the_files_or_the_one_given() -> None:
    assert load_recipe("recipe.yaml").name == "recipe"
    assert load_recipe(write(RECIPE + "name: other\n")).name == "other"


def test_a_stage_without_a_block_is_not_part_of_the_recipe() -> None:
    assert "dpo" not in load_recipe("recipe.yaml").settings


def test_results_that_do_not_depend_on_the_constitution_are_shared_by_all() -> None:
    recipe = load_recipe("recipe.yaml")
    assert recipe.constitution is not None
    steered = Path("runs/recipe") / recipe.constitution.key
    assert recipe.directory("sample") == Path("runs/recipe/shared/sample")
    assert recipe.directory("revise") == steered / "revise"
    assert recipe.directory("sft") == steered / "sft", "sft reads revise, so it depends on the constitution too"


def test_without_a_constitution_everything_is_shared() -> None:
    text = RECIPE.replace("constitution: small.yaml\n", "").replace("revise: {}\n", "").replace("compare: {}\n", "")
    helpful = "sft: {revisions: false, helpful: {sources: [{path: prompts.jsonl}]}}"
    human = "reward: {ai: false, human: [{path: prompts.jsonl}]}"
    recipe = load_recipe(
        write(text.replace("sft: {helpful: {harmless: [prompts.jsonl]}}", helpful).replace("reward: {}", human))
    )
    assert {recipe.directory(stage).parent.name for stage in recipe.settings} == {"shared"}


def test_every_fault_is_reported_at_once_with_its_line_and_key() -> None:
    path = write(
        """\
model: {path: org/model, pth: x}
prompts:
  sources:
    - path: missing.jsonl
constitution: nowhere.yaml
sample:
  sampling:
    temperature: true
    max_new_tokens: 3.7
reward: {ai: false}
dpo: {bta: 1}
"""
    )
    here = f"(looked in {Path.cwd()})"
    assert faults(path) == [
        "recipe.yaml: 6 problems",
        "line 1  model.pth: no such setting; did you mean `path`?",
        f"line 4  prompts.sources[0].path: missing.jsonl: no such file {here}; check the path",
        f"line 5  constitution: nowhere.yaml: no such file {here}; check the path",
        "line 8  sample.sampling.temperature: expected a number, got true/false",
        "line 9  sample.sampling.max_new_tokens: expected a whole number, got 3.7",
        "line 11  dpo.bta: no such setting; did you mean `beta`?",
    ]


def test_faults_of_stages_are_reported_with_the_line_of_their_key() -> None:
    text = RECIPE.replace("reward: {}", "reward:\n  ai: false\n  human: []")
    assert faults(write(text)) == [
        "recipe.yaml: 1 problem",
        "line 13  reward.human: no pairs to train on; give some, or set `ai: true`",
    ]


def test_a_missing_shared_block_that_a_stage_needs_is_reported() -> None:
    said = faults(write(RECIPE.replace("constitution: small.yaml\n", "")))
    assert "line 7  revise: needs `constitution`, which this recipe lacks; add it" in said


def test_the_constitutions_faults_are_reported_with_the_recipes() -> None:
    Path("small.yaml").write_text(CONSTITUTION.replace("id: calm", "id: calm\n    colour: red"))
    said = faults(write(RECIPE + "sed: 3\n"))
    assert said[0] == "recipe.yaml: 1 problem"
    assert said[1] == "line 12  sed: no such setting; did you mean `seed`?"
    assert said[2] == "small.yaml: 1 problem"
    assert said[3].startswith("line 4  principles[0].colour: no such setting")


def test_an_override_wins_over_the_file() -> None:
    recipe = load_recipe("recipe.yaml", ["sample.sampling.temperature=0.5", "seed=3", "seed=4", "dpo={beta: 0.2}"])
    assert recipe.settings["sample"].model_dump()["sampling"]["temperature"] == 0.5
    assert recipe.seed == 4
    assert recipe.settings["dpo"].model_dump()["beta"] == 0.2


@pytest.mark.parametrize("key", ["prompts.sources.0.limit", "prompts.sources[0].limit"])
def test_an_override_reaches_into_lists(key: str) -> None:
    recipe = load_recipe("recipe.yaml", [f"{key}=3"])
    assert recipe.shared["prompts"].sources[0].limit == 3


@pytest.mark.parametrize("name", ["../../x", ".hidden", ""])
def test_a_name_that_no_folder_can_have_is_reported_with_what_it_may_hold(name: str) -> None:
    [message] = faults("recipe.yaml", f"name={name!r}")[1:]
    assert message.startswith("--set name: may hold letters, digits, `_`, `-` and `.`")


def test_an_override_may_be_null_and_take_a_stage_out() -> None:
    assert "reward" not in load_recipe("recipe.yaml", ["reward=null"]).settings


def test_faults_of_overrides_are_reported_with_the_override() -> None:
    said = faults("recipe.yaml", "sample.sampling.top_p=2", "dpo.bta=3", "sft.epochs=-1", "dpo.kl.coef=1")
    assert said[0] == "recipe.yaml: 4 problems"
    above = said.pop(next(place for place, line in enumerate(said) if line.startswith("--set dpo.kl: ")))
    assert above.startswith("--set dpo.kl: no such setting; there are: "), "the fault is of a block above the key"
    assert sorted(said[1:]) == [
        "--set dpo.bta: no such setting; did you mean `beta`?",
        "--set sample.sampling.top_p: must be at most 1, got 2",
        "--set sft.epochs: must be above 0, got -1",
    ]


def test_a_fault_inside_a_value_that_an_override_gave_is_not_put_down_to_the_file() -> None:
    said = faults("recipe.yaml", "prompts.sources=[{path: gone.jsonl, limit: 0}]")
    assert "--set prompts.sources[0].limit: must be above 0, got 0" in said
    said = faults("recipe.yaml", "prompts.sources=[{path: gone.jsonl}]")
    assert said[1].startswith("--set prompts.sources[0].path: gone.jsonl: no such file")


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("a..b=3", "expected key=value"),
        ("seed=[1", "is not valid YAML"),
        ("seed.more=3", "`seed` is a single value, so there is no `seed.more`"),
        ("prompts.sources[].path=x", "give the index of the list's entry, such as prompts.sources[0].path"),
        ("prompts.sources[7].path=x", "there is no `prompts.sources.7`"),
        ("prompts.sources.7.path=x", "`prompts.sources` is a list of 1, so there is no `prompts.sources.7`"),
    ],
)
def test_an_override_that_cannot_be_applied_is_refused(override: str, fault: str) -> None:
    said = faults(write(RECIPE + "seed: 1\n"), override)
    assert said[0] == "recipe.yaml: 1 problem"
    assert said[1].startswith(f"--set {override}: ")
    assert fault in said[1]


def test_a_child_changes_its_parent_key_by_key() -> None:
    write(RECIPE + "name: parents\nseed: 5\n", "parent.yaml")
    child = "extends: parent.yaml\nsample: {sampling: {temperature: 0}}\nreward: null\n"
    recipe = load_recipe(write(child, "child.yaml"))
    assert recipe.name == "child", "a name is never inherited: two recipes must not share a folder"
    assert recipe.seed == 5
    assert recipe.settings["sample"].model_dump()["sampling"]["temperature"] == 0
    assert list(recipe.settings) == ["sample", "revise", "sft", "compare"]


def test_a_parent_is_looked_for_beside_its_child() -> None:
    Path("inner").mkdir()
    write("extends: ../recipe.yaml\n", "inner/child.yaml")
    assert load_recipe("inner/child.yaml").name == "child"


def test_a_parents_fault_is_reported_with_the_parents_file_and_line() -> None:
    write(RECIPE + "sed: 3\n", "parent.yaml")
    said = faults(write("extends: parent.yaml\ncolour: red\n", "child.yaml"))
    assert said[0] == "child.yaml: 1 problem"
    assert said[1].startswith("line 2  colour: no such setting")
    assert said[2:] == ["parent.yaml: 1 problem", "line 12  sed: no such setting; did you mean `seed`?"]


def test_a_parent_must_be_there_and_stand_alone() -> None:
    assert "no such file gone.yaml" in faults(write("extends: gone.yaml\n", "child.yaml"))[1]
    write("extends: recipe.yaml\n", "parent.yaml")
    assert "itself extends another recipe" in faults(write("extends: parent.yaml\n", "child.yaml"))[1]


def test_a_local_model_that_is_not_there_is_a_fault_and_a_hub_id_is_not() -> None:
    load_recipe("recipe.yaml", ["model.path=org/other"])
    for missing in ("./model", "/nowhere/model", "some.gguf", "a/b/c"):
        assert "no such f" in faults("recipe.yaml", f"model.path={missing}")[1]


def test_the_model_of_a_local_engine_is_looked_for_too() -> None:
    said = faults("recipe.yaml", "judge.engine={kind: local, model: ./judge}")
    assert said[1].startswith("--set judge.engine.model: ./judge: no such folder")
    load_recipe("recipe.yaml", ["judge.engine={kind: openai, model: ./judge, base_url: 'http://localhost:1/v1'}"])


def test_a_recipe_that_is_not_there_or_empty_is_refused() -> None:
    with pytest.raises(InputError, match="no such file"):
        load_recipe("gone.yaml")
    with pytest.raises(FileProblems, match="empty"):
        load_recipe(write("", "empty.yaml"))


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_a_name_that_no_folder_can_have_is_refused(name: str) -> None:
    assert any("name:" in line for line in faults("recipe.yaml", f"name='{name}'"))


def test_faults_of_training_blocks_are_reported_with_the_others_before_anything_runs() -> None:
    blocks = """\
sft:
  trl:
    learing_rate: 0.1
    adam_beta1: "0.9"
    output_dir: x
  optimizer: {learning_rate: .inf}
reward:
  optimizer: {batch_size: 6, micro_batch_size: 4}
  trl: {bf17: true, disable_dropout: false}
dpo:
  trl: {label_smoothing: 0.1}
sed: 1
"""
    others = "".join(line for line in RECIPE.splitlines(True) if not line.startswith(("sft:", "reward:")))
    said = faults(write(others + blocks))
    assert [line.partition("  ")[2] for line in said[1:]] == [
        "sft.trl.learing_rate: no such option; did you mean `learning_rate`? That is not set here; "
        "set `optimizer.learning_rate`",
        "sft.trl.adam_beta1: expected float, got '0.9'",
        "sft.trl.output_dir: the stage decides this itself; leave it out",
        "sft.optimizer.learning_rate: must be a finite number, got inf",
        "reward.optimizer.batch_size: 6 is not a multiple of micro_batch_size 4; change either",
        "reward.trl.bf17: no such option; did you mean `bf16`? That is not set here; set `model.precision`",
        "reward.trl.disable_dropout: the stage decides this itself; leave it out",
        "dpo.trl.label_smoothing: TRL ignores it with the loss `sigmoid`; use `loss_type: [robust]`",
        "sed: no such setting; did you mean `seed`?",
    ]


def test_options_of_trl_are_checked_by_name_type_and_place() -> None:
    said = faults(write(RECIPE), "sft.trl={learing_rate: 1, adam_beta1: '0.9', output_dir: x, adam_beta2: 0.9}")
    assert said[0] == "recipe.yaml: 3 problems"
    assert "--set sft.trl.adam_beta1: expected float, got '0.9'" in said
    assert "--set sft.trl.output_dir: the stage decides this itself; leave it out" in said
    assert any(line.startswith("--set sft.trl.learing_rate: no such option; did you mean") for line in said)


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("judge.engine={kind: openai}", "name the `model` that the server serves"),
        (
            "judge.engine={kind: openai, model: m, base_url: 'https://me:hush@localhost/v1'}",
            "put the key in the variable that api_key_env names",
        ),
        ("judge.engine={base_url: 'http://localhost'}", "kind local does not read base_url; remove it"),
        ("ppo.kl_horizon=5", "kl_horizon has no effect unless kl_coef is adapted"),
        ("ppo={kl_coef: 0, kl_target: 6}", "kl_coef 0 cannot be adapted to kl_target: set kl_coef above 0"),
        ("ppo.value_coef=0", "value_coef 0 trains no value, which advantage gae relies on"),
        ("sample.sampling.temperature=.nan", "must be a finite number, got nan"),
    ],
)
def test_settings_that_nothing_reads_or_can_compute_with_are_refused(override: str, fault: str) -> None:
    assert fault in "\n".join(faults("recipe.yaml", override))


def test_a_duplicate_key_and_a_bad_override_are_reported_with_the_other_faults() -> None:
    said = faults(write(RECIPE + "seed: 1\nseed: 2\nsed: 3\n"), "dpo", "sft.epochs=-1")
    assert said[0] == "recipe.yaml: 4 problems"
    assert "line 13  seed: duplicate key, first on line 12; keep one" in said
    assert "line 14  sed: no such setting; did you mean `seed`?" in said
    assert "--set dpo: expected key=value, such as ppo.kl_coef=0.1" in said
    assert "--set sft.epochs: must be above 0, got -1" in said


def test_without_its_parent_a_recipes_own_faults_are_reported_and_not_what_the_parent_may_have() -> None:
    said = faults(write("extends: gone.yaml\nmodel: {precision: fp32}\nsed: 3\nreward: {}\n", "child.yaml"))
    assert said[0] == "child.yaml: 2 problems"
    assert said[1].startswith("line 1  extends: no such file gone.yaml")
    assert said[2] == "line 3  sed: no such setting; did you mean `seed`?"


def test_engine_settings_that_change_no_answer_make_no_stage_stale() -> None:
    from align.settings.blocks import EngineBlock

    engine = {"kind": "openai", "model": "m", "base_url": "http://one/v1"}
    patient = EngineBlock(**engine, timeout_seconds=900, max_retries=20, concurrency=2, api_key_env="OTHER")
    assert patient.model_dump() == EngineBlock(**engine).model_dump() != EngineBlock(**engine, votes=3).model_dump()


@pytest.mark.parametrize("key", ["constitution", "output", "name", "model.path", "prompts.sources[0].path"])
def test_a_path_too_long_for_any_file_is_a_fault_of_its_key(key: str) -> None:
    fault = "\n".join(faults(write(RECIPE), f"{key}={'a' * 5000}"))
    assert key in fault
    assert "check the path" in fault
    assert len(fault) < 500


def test_an_override_nested_too_deeply_is_refused() -> None:
    assert "nested too deeply" in faults(write(RECIPE), f"seed={'[' * 3000}")[1]


def test_an_option_that_the_schedule_does_not_have_is_a_fault() -> None:
    path, cosine = write(RECIPE), "sft.optimizer.schedule=cosine"
    options = "sft.trl.lr_scheduler_kwargs={min_lr_rate: 0.1}"
    assert "`cosine` has only num_cycles, not 'min_lr_rate'" in "\n".join(faults(path, cosine, options))
    assert "`linear` has none" in "\n".join(faults(path, options))
    load_recipe(path, [cosine, "sft.trl.lr_scheduler_kwargs={num_cycles: 1.5}"])


HUMAN = "dpo:\n  ai: false\n  human: [{path: pairs.jsonl}]\n"


def child_of(parent: str, child: str, tiny: Path, *overrides: str) -> Recipe:
    """A recipe that extends another. Both are about training on human pairs."""
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    Path("parent.yaml").write_text(f"model: {{path: {tiny}}}\n{HUMAN}{parent}")
    Path("child.yaml").write_text(f"extends: parent.yaml\n{child}")
    return load_recipe("child.yaml", overrides)


def test_null_unsets_a_key_of_the_parent_unless_it_is_a_value_of_the_setting(tiny_model_dir: Path) -> None:
    parent = "  optimizer: {learning_rate: 0.5, batch_size: 32}\n  max_length: 9\n  trl: {dataloader_num_workers: 3}\n"
    unset = "dpo: {optimizer: {learning_rate: null}, max_length: null, trl: {dataloader_num_workers: null}}\n"
    dpo = child_of(parent, f"model: {{lora: null}}\n{unset}", tiny_model_dir).settings["dpo"]
    assert (dpo.optimizer.learning_rate, dpo.optimizer.batch_size) == (1e-5, 32)  # type: ignore[attr-defined]
    assert (dpo.max_length, dpo.trl) == (1024, {})  # type: ignore[attr-defined]
    whole = child_of(parent, "model: {lora: null}\ndpo: {optimizer: null}\n", tiny_model_dir)
    assert whole.shared["model"].lora is None
    assert whole.settings["dpo"].optimizer.batch_size == 16  # type: ignore[attr-defined]
    overridden = child_of(parent, "", tiny_model_dir, "dpo.max_length=null").settings["dpo"]
    assert overridden.max_length == 1024  # type: ignore[attr-defined]


def test_a_null_that_replaces_nothing_is_still_a_fault(tiny_model_dir: Path) -> None:
    with pytest.raises(InputError, match=r"child.yaml: 1 problem\n  line 2  dpo.max_length: expected a whole number"):
        child_of("", "dpo: {max_length: null}\n", tiny_model_dir)


def test_a_fault_of_a_whole_block_is_reported_for_the_file_that_has_it(tiny_model_dir: Path) -> None:
    with pytest.raises(InputError) as told:
        child_of("judge:\n  kind: rule\n  examples: 3\n", "judge: {scale: 3}\n", tiny_model_dir)
    assert str(told.value).splitlines()[:1] == ["parent.yaml: 1 problem"]
    assert "line 5  judge: kind rule does not read examples" in str(told.value)
    with pytest.raises(InputError, match=r"child.yaml: 1 problem\n  line 2  judge: kind rule does not read examples"):
        child_of("judge:\n  kind: choice\n  examples: 3\n", "judge: {kind: rule}\n", tiny_model_dir)
    with pytest.raises(InputError, match=r"child.yaml: 1 problem\n  line 2  sample: needs `prompts`"):
        child_of("sample: {}\n", "sample: {window: 3}\n", tiny_model_dir)
