"""The card of an exported data set: front matter for the hub, and how every row was made, in Markdown.

Texts that somebody else wrote (constitutions, names, what a server says) are escaped, so that they are shown and never
read as Markdown, HTML or front matter. Addresses of servers and folders of this machine are left out.
"""

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.constitution.constitution import Constitution
from align.constitution.principles import Principle
from align.engines.provenance import Provenance
from align.results.exported_rows import DATA_SETS, DRAWN, TRAIN, public_path
from align.results.published import PublishedRun
from align.run.artefacts import NOT_RELABELLED, Manifest

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
TAGS = ("align", "trl", "constitutional-ai", "rlaif", "preference", "synthetic")
LOOP = ("sample", "revise", "sft", "compare")
"""The stages whose settings decide what the rows are."""

PATHS = {"path", "model", "tokenizer", "hub_folder", "harmless", "benign"}
"""Settings whose texts are paths, or may be."""

OPTIONS = "trl"
MACHINES = "machine-generated"
HIDDEN = "(in the manifest)"
UNKNOWN = "unknown"
_MARKUP = re.compile(r"([\\`*_\[\]|~$@]|:(?=//)|(?<=www)\.)", re.IGNORECASE)
"""What means something within a line; what does so at a line's start never stands there."""


@dataclass(frozen=True)
class CardContent:
    """All that a card tells: the run, rows by data set and split, provenance, constitution, and prompts by source."""

    run: PublishedRun
    rows: Mapping[str, Mapping[str, int]]
    provenance: Sequence[Provenance]
    constitution: Constitution | None
    prompts: Mapping[str, int]
    demonstrations: Mapping[str, int]

    @property
    def made_here(self) -> bool:
        """Whether the run itself made any of the rows: of demonstrations, all but those that were read from files."""
        total = sum(sum(splits.values()) for splits in self.rows.values())
        return total > sum(self.demonstrations.values())


def card_text(content: CardContent) -> str:
    """The whole README.md."""
    from huggingface_hub import DatasetCard, DatasetCardData

    front = DatasetCardData(**front_matter(content))
    parts = "\n\n".join(part for part in _parts(content) if part)
    return str(DatasetCard(f"---\n{front.to_yaml()}\n---\n\n{parts}\n"))


def front_matter(content: CardContent) -> dict[str, Any]:
    """The card's metadata, as the hub reads it."""
    total = sum(sum(splits.values()) for splits in content.rows.values())
    languages = _languages(content.constitution)
    return {
        "pretty_name": _printable(content.run.name),
        **({"language": languages} if languages else {}),
        "license": UNKNOWN,
        "annotations_creators": [MACHINES if content.made_here else "no-annotation"],
        "language_creators": [MACHINES] * content.made_here + ["found"] * bool(content.demonstrations),
        "task_categories": ["text-generation"],
        "size_categories": [next((name for limit, name in SIZES if total < limit), "n>10M")],
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
    """Where the rows of a data set's split are, in the exported folder."""
    return f"data/{name}-{split}.parquet"


def shown(text: object) -> str:
    """A text of somebody else's inside a line or a table's cell."""
    return _MARKUP.sub(r"\\\1", html.escape(_printable(" ".join(str(text).split())), quote=False))


def fenced(text: str, language: str = "text") -> str:
    """A text of somebody else's as a block, in a fence that it cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    body = "\n".join(_printable(line) for line in re.split(r"\r\n|\r|\n|\x0b|\x0c|\x85|\u2028|\u2029", text))
    return f"{fence}{language}\n{body}\n{fence}"


def public(value: Any, key: str = "") -> Any:
    """A setting as it may be shown to everybody; `key` is what it is called, or the list or options that it is in."""
    if key == "base_url":
        return value and HIDDEN
    if key == "extra" and isinstance(value, Mapping):
        return {name: each if isinstance(each, bool | int | float) else HIDDEN for name, each in value.items()}
    if key == "files" and isinstance(value, Mapping):
        return [[public_path(name), found] for name, found in value.items()]
    if isinstance(value, Mapping):
        return {name: public(inner, key if key == OPTIONS else name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(each, key) for each in value]
    return public_path(value) if isinstance(value, str) and _is_path(key, value) else value


def _is_path(key: str, value: str) -> bool:
    """A prompt may begin with a slash too, so that the key decides; of options that TRL knows, a text without spaces
    may be one."""
    return key in PATHS or (key == OPTIONS and len(value.split()) == 1)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\t" else "\ufffd" for char in text)


def _languages(constitution: Constitution | None) -> list[str]:
    """ISO code of the constitution's language. A principle's own is that of its text, and not of what it judges."""
    if constitution is None:
        return []
    code = constitution.language.partition("-")[0].lower()
    return [code] if re.fullmatch("[a-z]{2,3}", code) else []


def _parts(content: CardContent) -> Iterator[str]:
    yield f"# {shown(content.run.name)}"
    yield _makers(content)
    yield _made_again(content.run)
    yield _rows(content)
    if content.provenance:
        yield _models(content.provenance)
        yield _sampling(content.provenance)
    else:
        yield "## Models and sampling\n\nA version made the run that did not say it of each row: see the recipe below."
    yield _constitution(content)
    yield from _judges(content.run)
    yield _counts(content.run)
    yield _gates(content.run)
    yield _sources(content)
    yield _recipe(content.run)
    yield _versions(content.run)


def _makers(content: CardContent) -> str:
    """Who wrote the rows, in words."""
    made = (
        "Made by machines with `align`: completions, critiques and revisions by language models, labels by a judge "
        "that applies a constitution (Constitutional AI, Bai et al. 2022, arXiv 2212.08073)."
    )
    read = sum(content.demonstrations.values())
    told = f"{read} of the demonstrations were read from files and not made here (see the sources below)."
    parts = ([made] if content.made_here else []) + ([told] if read else [])
    return " ".join(parts) + (
        " Nobody has read the rows one by one. Prompts may ask for harmful things, and completions may give them, the "
        "rejected ones above all."
    )


def _made_again(run: PublishedRun) -> str:
    """What to know of labels that are not those of their run."""
    if not run.relabelled:
        return ""
    standing = run.manifests["compare"].counts.get(NOT_RELABELLED, 0)
    stand = f" Those of {standing} revisions beside their originals stand as the run's `revise` gave them."
    return (
        "The labels were made again by `align relabel`: from the scores that the judge of a run had given, which was "
        f"asked nothing more, by the settings of `compare` below.{stand if standing else ''} What the judge is worth "
        "was measured under the run's own. Which prompts there were, and how its policy was trained, the run tells."
    )


def _rows(content: CardContent) -> str:
    rows = [
        (f"`{name}`", f"`{split}`", count, DATA_SETS[name].form)
        for name, splits in content.rows.items()
        for split, count in splits.items()
    ]
    tested = any(set(splits) - {TRAIN} for splits in content.rows.values())
    split = (
        "The `test` split has the prompts that the run's reward model was tested on; no prompt is in both splits.\n\n"
        if tested
        else ""
    )
    labels = (
        " `probability` is the judge's soft label, and `margin` 2 `probability` - 1, which `RewardTrainer` takes as "
        "the margin of its loss."
        if "preferences" in content.rows
        else ""
    )
    return (
        f"## Rows\n\n{table(('data set', 'split', 'rows', 'format'), rows)}\n\n{split}"
        "Each row says where it comes from: `…_provenance` columns have engine, model, the digest of its weights, "
        "sampling, constitution and seed; `revised_by` the ids of the principles of the rounds that led to a revision, "
        f"and `judged_by` those that the judge decided by.{labels}"
    )


def _models(provenance: Iterable[Provenance]) -> str:
    rows = [
        (
            f"{each.stage}: {each.step}",
            each.engine,
            shown(public_path(each.model)) or "-",
            _digest(each),
            f"`{_code(json.dumps(each.server_says, sort_keys=True))}`" if each.server_says else "-",
        )
        for each in provenance
    ]
    columns = ("who wrote it", "engine", "model", "weights (SHA-256)", "the server says")
    return (
        f"## Models\n\n{table(columns, rows)}\n\nA digest was taken from the weights that were loaded: of one file its "
        "SHA-256, of several that of what `sha256sum` prints of them. Of a model on a server there is the "
        "server's word alone, which nobody can verify."
    )


def _digest(entry: Provenance) -> str:
    if entry.model_digest:
        revision = f" (revision `{entry.model_revision}`)" if entry.model_revision else ""
        return f"`{entry.model_digest}`{revision}"
    return "no model" if entry.engine == "rule" else "not verifiable" if entry.engine == "server" else UNKNOWN


def _sampling(provenance: Iterable[Provenance]) -> str:
    rows = [
        (
            f"{each.stage}: {each.step}",
            *("-" if each.settings.get(key) is None else each.settings[key] for key in DRAWN),
            each.precision or "-",
            f"`{_code(json.dumps({key: value for key, value in each.settings.items() if key not in DRAWN}))}`",
            each.seed,
        )
        for each in provenance
    ]
    columns = ("who wrote it", *DRAWN, "precision", "other settings", "recipe's seed")
    return f"## Sampling and judging\n\n{table(columns, rows)}"


def _constitution(content: CardContent) -> str:
    settings = (content.run.manifests[stage].settings for stage in LOOP if stage in content.run.manifests)
    used = {each["constitution"]["digest"]: each["constitution"]["id"] for each in settings if each.get("constitution")}
    known = content.constitution
    lines = [f"- `{_code(name)}`, digest `{found}`" for found, name in used.items()]
    if known is None:
        told = [*lines, "", "Its text is not kept."] if lines else ["None."]
        return "\n".join(["## Constitution", "", *told])
    facts = {
        "title": known.title,
        "version": known.version,
        "source": known.source,
        "licence": known.licence or UNKNOWN,
    }
    lines += [f"- {name}: {shown(value)}" for name, value in facts.items() if value]
    texts = [
        f"{number}. {shown(each.id)}\n\n{fenced(principle_text(each, known.language))}"
        for number, each in enumerate(known.principles, 1)
    ]
    return "\n".join(["## Constitution", "", *lines, "", "### Principles", "", "\n\n".join(texts)])


def principle_text(principle: Principle, language: str = "") -> str:
    """All that a principle says and how it counts, a line each; `language` is its constitution's."""
    texts = {
        "language": None if principle.language in (None, language) else principle.language,
        "hard": "its rule's violation loses outright" if principle.hard else None,
        "tier": principle.tier,
        "weight": None if principle.weight == 1 else f"{principle.weight:g}",
        "applies to": ", ".join(principle.applies),
        "text": principle.text,
        "opposite": principle.opposite,
        "critique": principle.critique,
        "revision": principle.revision,
        "compare": principle.compare,
        "rule": json.dumps(principle.rule.model_dump(exclude_none=True), ensure_ascii=False)
        if principle.rule
        else None,
        "documents": "shown to the critic and the judge, and not part of this data set" if principle.sources else None,
    }
    return "\n".join(f"{name}: {text}" for name, text in texts.items() if text)


def _judges(run: PublishedRun) -> Iterator[str]:
    """What each stage's judge was worth on the constitution's probes, and beside people."""
    for stage in ("revise", "compare"):
        figures = run.manifests[stage].figures if stage in run.manifests else {}
        if judge := figures.get("judge"):
            found = (
                f"`{_code(public_judge(judge['judge']))}`: {_probes(judge)}.{_calibration(figures.get('calibration'))}"
            )
            yield f"## The judge of `{stage}`\n\n{found}"


def public_judge(name: str) -> str:
    """A judge's name (its kind, then its engine and model) without the folders of this machine."""
    *kinds, model = name.split(":", 2)
    return ":".join((*kinds, public_path(model)))


def _probes(judge: Mapping[str, Any]) -> str:
    if not judge["n"]:
        return "tested on no probes"
    scored = f"; scored by {shown(judge['scored_by'])}" if judge.get("scored_by") else ""
    bias = f"; position bias {judge['position_bias']:+.3f}" if judge.get("scored_by") else ""
    interval = f"{judge['low']:.1%} to {judge['high']:.1%}"
    return f"{judge['accuracy']:.1%} of {judge['n']} probes right, 95% interval {interval}{scored}{bias}"


def _calibration(found: Mapping[str, Any] | None) -> str:
    """Agreement with people, where it was measured."""
    if not found:
        return " It was not calibrated on pairs that people labelled."
    kept = {
        name: found[name]
        for name in ("pairs", "decided", "accuracy", "expected_calibration_error", "brier", "baselines")
        if found.get(name) is not None
    }
    return f"\n\nBeside pairs that people labelled:\n\n{fenced(json.dumps(kept, indent=2, default=str), 'json')}"


def _counts(run: PublishedRun) -> str:
    rows = [
        (f"`{stage}`", shown(name), count)
        for stage in LOOP
        if stage in run.manifests
        for name, count in run.manifests[stage].counts.items()
    ]
    return f"## Kept and set aside\n\n{table(('stage', 'what', 'count'), rows)}"


def _gates(run: PublishedRun) -> str:
    rows = [row for stage in LOOP if stage in run.manifests for row in _gates_of(stage, run.manifests[stage])]
    if not rows:
        return ""
    columns = ("stage", "gate", "share", "of rows", "limit")
    return f"### Gates: shares of a whole set, over whose limits a stage stops\n\n{table(columns, rows)}"


def _gates_of(stage: str, manifest: Manifest) -> Iterator[tuple[object, ...]]:
    limits = manifest.settings["settings"].get("gates", {})
    least = limits.get("min_rows", 1)
    for name, found in manifest.figures.get("gates", {}).items():
        limit = "off" if limits.get(name) is None else f"{limits[name]:.1%}"
        if name not in limits:
            limit = "none"  # shown beside the gates, and limited by none
        elif found["rows"] < least:
            limit += f", from {least} rows"
        yield f"`{stage}`", f"`{name}`", f"{found['share']:.1%}", found["rows"], limit


def _sources(content: CardContent) -> str:
    rows = [(shown(public_path(name)), "prompts", count, UNKNOWN) for name, count in content.prompts.items()]
    rows += [
        (shown(public_path(name)), "demonstrations", count, UNKNOWN) for name, count in content.demonstrations.items()
    ]
    columns = ("source", "what", "rows", "licence")
    told = f"{table(columns, rows)}\n\n" if rows else ""
    return (
        f"## Sources and licences\n\n{told}The licences of prompts, of demonstrations that people "
        "wrote, and of what the models wrote are unknown to the program that made this card: look them up, and put the "
        "result into `license` above, before you share it."
    )


def _recipe(run: PublishedRun) -> str:
    slices = {stage: public(run.manifests[stage].settings) for stage in LOOP if stage in run.manifests}
    return "## Recipe\n\nThe settings of the stages that made the rows.\n\n" + fenced(
        json.dumps(slices, indent=1, ensure_ascii=False), "json"
    )


def _versions(run: PublishedRun) -> str:
    found: dict[str, Manifest] = {stage: run.manifests[stage] for stage in LOOP if stage in run.manifests}
    names = list(dict.fromkeys(name for manifest in found.values() for name in manifest.environment))
    rows = [
        (f"`{name}`", *(shown(manifest.environment.get(name, "-")) for manifest in found.values())) for name in names
    ]
    return f"## Versions\n\n{table(('', *(f'`{stage}`' for stage in found)), rows)}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown. Cells are taken as they are: escape what somebody else wrote."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _code(text: str) -> str:
    """A text of somebody else's inside single backticks."""
    return _printable(" ".join(text.split())).replace("`", "'").replace("|", "/")
