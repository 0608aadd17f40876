"""The card (README.md) of an exported data set: front matter for the hub, and how every row was made, in Markdown."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.constitution.constitution import Constitution
from align.engines.provenance import Provenance
from align.results.card_methods import UNKNOWN, method_sections
from align.results.exported_rows import DATA_SETS, TRAIN
from align.results.public_text import escaped, markdown_table, printable, public_path
from align.results.published import PublishedRun
from align.run.artefacts import NOT_RELABELLED

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
TAGS = ("align", "trl", "constitutional-ai", "rlaif", "preference", "synthetic")
MACHINES = "machine-generated"


@dataclass(frozen=True)
class CardContent:
    """What a card reports. `rows` counts rows by data set and split; `prompts` and `demonstrations` count by source."""

    run: PublishedRun
    rows: Mapping[str, Mapping[str, int]]
    provenance: Sequence[Provenance]
    constitution: Constitution | None
    prompts: Mapping[str, int]
    demonstrations: Mapping[str, int]

    @property
    def total_rows(self) -> int:
        return sum(sum(splits.values()) for splits in self.rows.values())

    @property
    def has_generated_rows(self) -> bool:
        """Whether the run generated any of the rows itself: everything but the demonstrations read from files."""
        return self.total_rows > sum(self.demonstrations.values())


def card_text(content: CardContent) -> str:
    """The whole README.md."""
    from huggingface_hub import DatasetCard, DatasetCardData

    front = DatasetCardData(**front_matter(content))
    sections = "\n\n".join(section for section in _sections(content) if section)
    return str(DatasetCard(f"---\n{front.to_yaml()}\n---\n\n{sections}\n"))


def front_matter(content: CardContent) -> dict[str, Any]:
    """The card's metadata, as the hub reads it."""
    languages = _languages(content.constitution)
    return {
        "pretty_name": printable(content.run.name),
        **({"language": languages} if languages else {}),
        "license": UNKNOWN,
        "annotations_creators": [MACHINES if content.has_generated_rows else "no-annotation"],
        "language_creators": [MACHINES] * content.has_generated_rows + ["found"] * bool(content.demonstrations),
        "task_categories": ["text-generation"],
        "size_categories": [next((name for limit, name in SIZES if content.total_rows < limit), "n>10M")],
        "tags": list(TAGS),
        "configs": [
            {
                "config_name": name,
                **({"default": True} if number == 0 else {}),
                "data_files": [{"split": split, "path": data_file(name, split)} for split in splits],
            }
            for number, (name, splits) in enumerate(content.rows.items())
        ],
    }


def data_file(name: str, split: str) -> str:
    """The path of a data set's split in the exported folder."""
    return f"data/{name}-{split}.parquet"


def _languages(constitution: Constitution | None) -> list[str]:
    """ISO code of the constitution's language. A principle's `language` is that of its own text, not of the rows."""
    if constitution is None:
        return []
    code = constitution.language.partition("-")[0].lower()
    return [code] if re.fullmatch("[a-z]{2,3}", code) else []


def _sections(content: CardContent) -> Iterator[str]:
    yield f"# {escaped(content.run.name)}"
    yield _authorship(content)
    yield _relabelling(content.run)
    yield _rows(content)
    yield _sources(content)
    yield from method_sections(content.run, content.provenance, content.constitution)


def _authorship(content: CardContent) -> str:
    """Who wrote the rows."""
    generated = (
        "Made by machines with `align`: language models wrote the completions, critiques and revisions, and a judge "
        "that applies a constitution labelled them (Constitutional AI, Bai et al. 2022, arXiv 2212.08073). "
    )
    read = sum(content.demonstrations.values())
    from_files = f"{read} of the demonstrations were read from files, not generated (see the sources below). "
    return (
        f"{generated if content.has_generated_rows else ''}{from_files if read else ''}Nobody has read the rows one by "
        "one. Prompts may ask for harmful content, and completions, above all the rejected ones, may contain it."
    )


def _relabelling(run: PublishedRun) -> str:
    """What a reader must know about labels that `align relabel` recomputed."""
    if not run.relabelled:
        return ""
    unchanged = run.manifests["compare"].counts.get(NOT_RELABELLED, 0)
    exception = f" {unchanged} revision pairs keep the label that the run's `revise` gave them." if unchanged else ""
    return (
        "The labels were recomputed by `align relabel` from the scores that a run's judge had given, with the settings "
        f"of `compare` below; no model was asked again.{exception} The judge's accuracy was measured with the run's "
        "own settings. The run's own export describes its prompts and how its policy was trained."
    )


def _rows(content: CardContent) -> str:
    rows = [
        (f"`{name}`", f"`{split}`", count, DATA_SETS[name].trl_format)
        for name, splits in content.rows.items()
        for split, count in splits.items()
    ]
    split, labels = "", ""
    if any(set(splits) - {TRAIN} for splits in content.rows.values()):
        split = "The prompts of the `test` split, which the reward model was tested on, are not in `train`.\n\n"
    if "preferences" in content.rows:
        labels = " `probability` is the judge's soft label; `RewardTrainer` uses `margin`, 2 `probability` - 1."
    return (
        f"## Rows\n\n{markdown_table(('data set', 'split', 'rows', 'format'), rows)}\n\n{split}"
        "Each row records its origin. The `…_provenance` columns hold engine, model, the digest of its weights, "
        "sampling settings, constitution and seed. `revised_by` lists the principles of the rounds that led to a "
        f"revision, and `judged_by` the principles that decided the judge's verdict.{labels}"
    )


def _sources(content: CardContent) -> str:
    counted = {"prompts": content.prompts, "demonstrations": content.demonstrations}
    rows = [
        (escaped(public_path(source)), kind, count, UNKNOWN)
        for kind, sources in counted.items()
        for source, count in sources.items()
    ]
    sources = f"{markdown_table(('source', 'kind', 'rows', 'licence'), rows)}\n\n" if rows else ""
    return (
        f"## Sources and licences\n\n{sources}`align` does not know the licences of the prompts, of demonstrations "
        "written by people, or of the models' outputs. Look them up and set `license` above before you share this data "
        "set."
    )
