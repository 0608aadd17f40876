"""The sections of an export card that say how the rows were made, in Markdown.

They cover models, sampling, constitution, judges, counts, gates, recipe and versions.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.constitution.constitution import Constitution, Principle
from align.engines.provenance import Provenance
from align.results.exported_rows import SAMPLING_KEYS
from align.results.public_text import (
    escaped,
    fenced,
    inline_code,
    markdown_table,
    public_judge,
    public_path,
    public_settings,
)
from align.results.published import PublishedRun
from align.run.artefacts import Manifest

ROW_STAGES = ("sample", "revise", "sft", "compare")
"""The stages whose settings decide what the rows are."""

UNKNOWN = "unknown"


def method_sections(
    run: PublishedRun, provenance: Sequence[Provenance], constitution: Constitution | None
) -> Iterator[str]:
    """The sections in the order they are shown; an empty one is left out by the card."""
    stages = {stage: run.manifests[stage] for stage in ROW_STAGES if stage in run.manifests}
    if provenance:
        yield _models(provenance)
        yield _sampling(provenance)
    else:
        yield "## Models and sampling\n\nAn early version made this run and recorded them only in the recipe below."
    yield _constitution(stages, constitution)
    yield from _judges(run)
    yield _counts(stages)
    yield _gates(stages)
    yield _recipe(stages)
    yield _versions(stages)


def _models(provenance: Sequence[Provenance]) -> str:
    rows = [
        (
            f"{each.stage}: {each.step}",
            each.engine,
            escaped(public_path(each.model)) or "-",
            _model_digest(each),
            f"`{inline_code(json.dumps(each.server_says, sort_keys=True))}`" if each.server_says else "-",
        )
        for each in provenance
    ]
    columns = ("stage and step", "engine", "model", "weights (SHA-256)", "reported by the server")
    return (
        f"## Models\n\n{markdown_table(columns, rows)}\n\nDigests are of the weights that were loaded: the SHA-256 of "
        "a single file, or for several files the SHA-256 of what `sha256sum` prints for them. What a server reports of "
        "its model cannot be verified."
    )


def _model_digest(entry: Provenance) -> str:
    if entry.model_digest:
        revision = f" (revision `{entry.model_revision}`)" if entry.model_revision else ""
        return f"`{entry.model_digest}`{revision}"
    return "no model" if entry.engine == "rule" else "not verifiable" if entry.engine == "server" else UNKNOWN


def _sampling(provenance: Sequence[Provenance]) -> str:
    rows = []
    for each in provenance:
        others = {key: value for key, value in each.settings.items() if key not in SAMPLING_KEYS}
        sampling = ("-" if each.settings.get(key) is None else each.settings[key] for key in SAMPLING_KEYS)
        settings = f"`{inline_code(json.dumps(others))}`"
        rows.append((f"{each.stage}: {each.step}", *sampling, each.precision or "-", settings, each.seed))
    columns = ("stage and step", *SAMPLING_KEYS, "precision", "other settings", "recipe seed")
    return f"## Sampling and judging\n\n{markdown_table(columns, rows)}"


def _constitution(stages: Mapping[str, Manifest], constitution: Constitution | None) -> str:
    settings = (manifest.settings for manifest in stages.values())
    used = {each["constitution"]["digest"]: each["constitution"]["id"] for each in settings if each.get("constitution")}
    lines = [f"- `{inline_code(name)}`, digest `{digest}`" for digest, name in used.items()]
    if constitution is None:
        missing = [*lines, "", "The run keeps no copy of its text."] if lines else ["None."]
        return "\n".join(["## Constitution", "", *missing])
    facts = {name: getattr(constitution, name) for name in ("title", "version", "source")}
    facts["licence"] = constitution.licence or UNKNOWN
    lines += [f"- {name}: {escaped(value)}" for name, value in facts.items() if value]
    texts = [
        f"{number}. {escaped(each.id)}\n\n{fenced(principle_text(each, constitution.language))}"
        for number, each in enumerate(constitution.principles, 1)
    ]
    return "\n".join(["## Constitution", "", *lines, "", "### Principles", "", "\n\n".join(texts)])


def principle_text(principle: Principle, language: str = "") -> str:
    """What a principle says and how it counts, one line for each key; `language` is the constitution's."""
    rule = principle.rule
    texts = {
        "language": None if principle.language in (None, language) else principle.language,
        "hard": "a completion that breaks its rule loses the comparison" if principle.hard else None,
        "tier": principle.tier,
        "weight": None if principle.weight == 1 else f"{principle.weight:g}",
        "applies to": ", ".join(principle.applies),
        **{name: getattr(principle, name) for name in ("text", "opposite", "critique", "revision", "compare")},
        "rule": rule and json.dumps(rule.model_dump(exclude_none=True), ensure_ascii=False),
        "documents": "shown to the critic and the judge; not part of this data set" if principle.sources else None,
    }
    return "\n".join(f"{name}: {text}" for name, text in texts.items() if text)


def _judges(run: PublishedRun) -> Iterator[str]:
    """How each stage's judge did on the constitution's probes and on pairs that people labelled."""
    for stage in ("revise", "compare"):
        figures = run.manifests[stage].figures if stage in run.manifests else {}
        if judge := figures.get("judge"):
            name = inline_code(public_judge(judge["judge"]))
            calibration = _calibration(figures.get("calibration"))
            yield f"## The judge of `{stage}`\n\n`{name}`: {_probes(judge)}.{calibration}"


def _probes(judge: Mapping[str, Any]) -> str:
    if not judge["n"]:
        return "not tested on any probes"
    accuracy = f"{judge['accuracy']:.1%} of {judge['n']} probes right"
    interval = f"95% interval {judge['low']:.1%} to {judge['high']:.1%}"
    if not (scored_by := judge.get("scored_by")):
        return f"{accuracy}, {interval}"
    return f"{accuracy}, {interval}; scored by {escaped(scored_by)}; position bias {judge['position_bias']:+.3f}"


def _calibration(figures: Mapping[str, Any] | None) -> str:
    """Agreement with people, if it was measured."""
    if not figures:
        return " It was not calibrated on pairs that people labelled."
    shown = {
        name: figures[name]
        for name in ("pairs", "decided", "accuracy", "expected_calibration_error", "brier", "baselines")
        if figures.get(name) is not None
    }
    return f"\n\nOn pairs that people labelled:\n\n{fenced(json.dumps(shown, indent=2, default=str), 'json')}"


def _counts(stages: Mapping[str, Manifest]) -> str:
    rows = [
        (f"`{stage}`", escaped(name), count)
        for stage, manifest in stages.items()
        for name, count in manifest.counts.items()
    ]
    return f"## Rows kept and rejected\n\n{markdown_table(('stage', 'what was counted', 'count'), rows)}"


def _gates(stages: Mapping[str, Manifest]) -> str:
    rows = [row for stage, manifest in stages.items() for row in _gate_rows(stage, manifest)]
    columns = ("stage", "gate", "share", "rows measured", "limit")
    title = "### Gates: shares measured over all rows; a stage stops if one exceeds its limit"
    return f"{title}\n\n{markdown_table(columns, rows)}" if rows else ""


def _gate_rows(stage: str, manifest: Manifest) -> Iterator[tuple[object, ...]]:
    limits = manifest.settings["settings"].get("gates", {})
    least = limits.get("min_rows", 1)
    for name, measured in manifest.figures.get("gates", {}).items():
        limit = "off" if limits.get(name) is None else f"{limits[name]:.1%}"
        if name not in limits:
            limit = "none"  # a share that is reported with the gates but has no limit
        elif measured["rows"] < least:
            limit += f", from {least} rows"
        yield f"`{stage}`", f"`{name}`", f"{measured['share']:.1%}", measured["rows"], limit


def _recipe(stages: Mapping[str, Manifest]) -> str:
    slices = {stage: public_settings(manifest.settings) for stage, manifest in stages.items()}
    recipe = fenced(json.dumps(slices, indent=1, ensure_ascii=False), "json")
    return f"## Recipe\n\nThe settings of the stages that made the rows.\n\n{recipe}"


def _versions(stages: Mapping[str, Manifest]) -> str:
    names = dict.fromkeys(name for manifest in stages.values() for name in manifest.environment)
    rows = [
        (f"`{name}`", *(escaped(manifest.environment.get(name, "-")) for manifest in stages.values())) for name in names
    ]
    return f"## Versions\n\n{markdown_table(('', *(f'`{stage}`' for stage in stages)), rows)}"
