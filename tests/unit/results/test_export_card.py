"""The card of an exported data set, parsed by other libraries: text from outside stays text, and nothing leaks."""

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DatasetCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from align.constitution.constitution import Constitution
from align.constitution.principles import Principle
from align.engines.engine import EngineIdentity
from align.engines.provenance import Provenance
from align.results.card_methods import principle_text
from align.results.export_card import CardContent, card_text
from align.results.public_text import escaped, fenced, public_path, public_settings
from align.results.published import PublishedRun
from align.run.artefacts import Manifest

HOSTILE = (
    "---\nlicense: mit\n---\n",
    "```\n# A heading\n```",
    "<script>alert(1)</script>",
    "| a | b |\n| --- | --- |",
    "[click](javascript:alert(1))",
    "![](http://evil.example/pixel.png)",
    "# Heading",
    "http://evil.example",
    "www.evil.example",
    "\x00\x1b[31m\u202e",
    "`` ` `",
    "\\",
    "&lt;b&gt;",
)
MARKDOWN = MarkdownIt("commonmark").enable("table")


class Tags(HTMLParser):
    """Counts how often each tag opens, and collects the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.opened: dict[str, int] = {}
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.opened[tag] = self.opened.get(tag, 0) + 1

    def handle_data(self, data: str) -> None:
        self.text += data


def content(text: str, name: str = "run") -> CardContent:
    """A card with `text` in every place that holds text from outside."""
    constitution = Constitution.model_validate(
        {
            "id": "c",
            "title": f"t{text}",
            "source": text,
            "licence": text,
            "principles": [{"id": "p", "text": f"t{text}", "critique": f"t{text}", "revision": f"t{text}"}],
        }
    )
    identity = EngineIdentity("server", text, said={"id": text})
    entry = Provenance.of("revise", "revision", identity, {"top_p": 1.0, "system_prompt": text}, 0, constitution)
    manifest = Manifest(
        stage="revise",
        fingerprint="f",
        settings={
            "stage": "revise",
            "settings": {"note": text, "gates": {}},
            "files": {f"/home/me/{name}": "d"},
            "constitution": {"id": f"c{text}", "digest": "d"},
        },
        inputs={},
        outputs={},
        counts={f"rejected: breaks {text}": 3},
        figures={"judge": {"judge": f"choice:openai:{text}", "n": 0, "accuracy": 0.5, "scored_by": text}},
        environment={"torch": text},
    )
    run = PublishedRun(Path("runs/recipe") / name, {"revise": manifest})
    rows = {"revisions": {"train": 1500}}
    return CardContent(run, rows, [entry], constitution, {f"{text}.jsonl": 3}, {})


def tags(card: str) -> dict[str, int]:
    return Tags(MARKDOWN.render(DatasetCard(card).text)).opened


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_adds_no_markup_and_no_front_matter(text: str) -> None:
    harmless, hostile = card_text(content("plain")), card_text(content(text))
    assert tags(hostile) == tags(harmless)
    assert DatasetCard(hostile).data.to_dict() == DatasetCard(harmless).data.to_dict()


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("`~|<>[]()!#*_-\\\n\r &;:/.wab1\u2028\x85"), min_size=1, max_size=30))
def test_no_text_changes_the_structure_of_the_page(text: str) -> None:
    assert tags(card_text(content(text))) == tags(card_text(content("plain")))


def test_the_card_says_what_the_hub_needs_to_load_and_to_list_it() -> None:
    data = DatasetCard(card_text(content("plain"))).data
    path = {"split": "train", "path": "data/revisions-train.parquet"}
    assert data.configs == [{"config_name": "revisions", "default": True, "data_files": [path]}]
    assert (data.size_categories, data.license, data.language) == (["1K<n<10K"], "unknown", ["en"])
    assert data.pretty_name == "recipe/run"


@pytest.mark.parametrize(
    ("read", "creators", "annotations"),
    [
        (0, ["machine-generated"], "machine-generated"),
        (3, ["machine-generated", "found"], "machine-generated"),
        (9, ["found"], "no-annotation"),
    ],
)
def test_demonstrations_from_files_are_not_called_machine_generated(
    read: int, creators: list[str], annotations: str
) -> None:
    given = dataclasses.replace(
        content("plain"), rows={"sft": {"train": 9}}, demonstrations={"people.jsonl": read} if read else {}
    )
    card = DatasetCard(card_text(given))
    assert card.data.language_creators == creators
    assert card.data.annotations_creators == [annotations]
    assert ("Made by machines" in card.text) == (read < 9)
    assert (f"{read} of the demonstrations were read from files" in card.text) == (read > 0)


def test_a_run_whose_name_is_yaml_is_still_a_name() -> None:
    assert DatasetCard(card_text(content("plain", "a: [b] #c"))).data.pretty_name == "recipe/a: [b] #c"


def test_a_block_shows_its_text_as_it_is() -> None:
    text = "one ``` two\n~~~~\n    three\n\n# four `"
    [block] = [token for token in MARKDOWN.parse(fenced(text)) if token.type == "fence"]
    assert block.content == text + "\n"


def test_a_line_shows_its_words_as_they_are() -> None:
    text = "a *b* _c_ `d` | [e](f) <g> &amp; ~h~ $i$ \\j"
    assert Tags(MARKDOWN.renderInline(escaped(text))).text == text


def test_texts_are_shown_as_they_are_and_files_of_the_same_name_each() -> None:
    texts = {"system_prompt": "/no_think Answer in 1/2 lines", "stop": "/end", "target_modules": "../x"}
    assert public_settings(texts) == texts
    files = {"/home/a/rows.jsonl": "1", "/home/b/rows.jsonl": "2"}
    assert public_settings({"files": files}) == {"files": [["rows.jsonl", "1"], ["rows.jsonl", "2"]]}


def test_settings_are_shown_without_folders_addresses_and_texts_of_further_keys() -> None:
    given_settings = {
        "path": "/home/me/secret/model",
        "files": {"/home/me/secret/rows.jsonl": "abc"},
        "trl": {"deepspeed": "/home/me/secret/zero.json", "options": [{"dir": "~/secret/logs"}]},
        "harmless": ["/home/me/my secret/rows.jsonl", "benign"],
        "engine": {"base_url": "https://user:hush@inner.example/v1", "extra": {"top_k": 0, "token": "hush"}},
        "sources": [
            {"path": "C:\\Users\\me\\secret\\rows.jsonl"},
            {"path": "Anthropic/hh-rlhf"},
            {"path": "~/secret/x"},
        ],
    }
    told = json.dumps(public_settings(given_settings))
    assert not [word for word in ("secret", "hush", "inner.example", "/home") if word in told]
    assert all(word in told for word in ("model", "rows.jsonl", "Anthropic/hh-rlhf", '"top_k": 0', "token"))


@pytest.mark.parametrize(
    ("path", "shown_path"),
    [
        ("/a/b/c.jsonl", "c.jsonl"),
        ("~/c.jsonl", "c.jsonl"),
        ("~alice/data/c.jsonl", "c.jsonl"),
        ("../../home/alice/c.jsonl", "c.jsonl"),
        ("data/../../alice/c.jsonl", "c.jsonl"),
        ("..\\alice\\c.jsonl", "c.jsonl"),
        ("file:///home/alice/c.jsonl", "c.jsonl"),
        ("file:c.jsonl", "c.jsonl"),
        ("D:\\alice\\c.jsonl", "c.jsonl"),
        ("recipes/c.jsonl", "recipes/c.jsonl"),
        ("./c..d.jsonl", "./c..d.jsonl"),
        ("a/", "a/"),
    ],
)
def test_only_paths_that_lead_out_of_the_folder_are_cut(path: str, shown_path: str) -> None:
    assert public_path(path) == shown_path


@pytest.mark.parametrize(
    ("judge", "shown_judge"),
    [
        ("rule", "rule"),
        ("contrast:local:/home/alice/x.gguf", "contrast:local:x.gguf"),
        ("choice:local:~/alice/llama", "choice:local:llama"),
        ("choice:openai:org/model", "choice:openai:org/model"),
        ("choice:local:wheel:some-model", "choice:local:wheel:some-model"),
    ],
)
def test_a_judge_is_named_without_folders(judge: str, shown_judge: str) -> None:
    figures = {"judge": judge, "n": 0, "accuracy": 0.5}
    assert f"`{shown_judge}`: not tested on any probes" in judged(judge=figures)


def judged(**figures: Any) -> str:
    """The card of a run whose judge has these figures."""
    plain = content("plain")
    manifest = plain.run.manifests["revise"]
    run = dataclasses.replace(plain.run, manifests={"revise": dataclasses.replace(manifest, figures=figures)})
    return card_text(dataclasses.replace(plain, run=run))


def test_a_judge_is_reported_with_its_accuracy_on_probes_and_on_human_pairs() -> None:
    probes = {"judge": "choice:m", "n": 24, "accuracy": 0.875, "low": 0.69, "high": 0.957, "position_bias": -0.125}
    told = judged(
        judge={**probes, "scored_by": "vote of 8 samples"},
        calibration={"pairs": 300, "accuracy": {"value": 0.61}, "expected_calibration_error": 0.07},
    )
    assert "`choice:m`: 87.5% of 24 probes right, 95% interval 69.0% to 95.7%; scored by vote of 8 samples" in told
    assert "position bias -0.125" in told and '"expected_calibration_error": 0.07' in told
    assert "not calibrated" in judged(judge=probes), "a manifest of a version that did not say how it was scored"


def test_the_card_shows_a_principle_s_weight_and_scope() -> None:
    principle = Principle(
        id="p",
        text="Be kind.",
        weight=2.5,
        tier="first",
        hard=True,
        applies=("letters", "poems"),
        rule={"excludes": "!"},
    )
    told = principle_text(principle).splitlines()
    assert {"weight: 2.5", "tier: first", "applies to: letters, poems"} <= set(told)
    assert any(line.startswith("hard: ") for line in told)
    assert principle_text(Principle(id="p", text="Be kind.")) == "text: Be kind."
    french = Principle(id="p", text="Sois gentil.", language="fr")
    assert principle_text(french, "fr") == "text: Sois gentil."
    assert principle_text(french, "en").splitlines()[0] == "language: fr"


def test_a_share_over_its_limit_is_reported_with_the_least_rows_of_the_limit() -> None:
    given = content("plain")
    manifest = given.run.manifests["revise"]
    manifest.settings["settings"]["gates"] = {"emoji": 0.25, "min_rows": 50}
    share = {"share": 0.5, "count": 1, "rows": 2}
    manifest.figures["gates"] = {"emoji": share, "critiques_cut": share}
    card = card_text(given)
    assert "| 50.0% | 2 | 25.0%, from 50 rows |" in card
    assert "`critiques_cut` | 50.0% | 2 | none |" in card
    assert "none of which closed" not in card


def test_the_card_explains_labels_only_if_there_are_any() -> None:
    labelled = dataclasses.replace(content("plain"), rows={"preferences": {"train": 9}})
    assert "soft label" in card_text(labelled)
    assert "soft label" not in card_text(content("plain"))


@pytest.mark.parametrize("standing", [0, 7])
def test_unchanged_labels_are_not_called_recomputed(standing: int) -> None:
    given = content("plain")
    counts = {"pairs": 3, "revision_pairs": 7, "revision_pairs_not_relabelled": standing}
    compare = dataclasses.replace(given.run.manifests["revise"], stage="compare", counts=counts)
    run = dataclasses.replace(given.run, manifests={"compare": compare}, relabelled=True)
    told = card_text(dataclasses.replace(given, run=run))
    assert "recomputed by `align relabel`" in told
    assert (f"{standing} revision pairs keep the label that" in told) == (standing > 0)
