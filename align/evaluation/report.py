"""The results of `evaluate`: the contents of `report.json` and `samples.jsonl`, and the table for a terminal."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError
from rich.console import Console

from align.constitution.rules import Rule
from align.errors import FileProblems, InputError, Problem
from align.figures.statistics import Estimate
from align.figures.tables import Sheet, print_sheet
from align.figures.text_metrics import TextFigures
from align.records import Conversation, FinishReason, Row, read_rows
from align.run.artefacts import stage_folder
from align.settings.blocks import Block

REPORT = "report.json"
SAMPLES = "samples.jsonl"
CANDIDATES = "best_of.jsonl"  # all candidates of best-of-n, with their scores
BASE = "base"
KL_ROW = "KL to {} (nats)"
TIED = 0.5
"""The probability of being better that counts as a tie."""
_TEXT_ROWS = (
    ("length (tokens)", "mean_tokens", "{:.0f}"),
    ("distinct-1", "distinct_1", "{:.2f}"),
    ("distinct-2", "distinct_2", "{:.2f}"),
    ("repeated 4-grams", "repetition", "{:.0%}"),
    ("same last sentence", "same_ending", "{:.0%}"),
    ("ended by a stop token", "stopped", "{:.0%}"),
)


@dataclass(frozen=True)
class EvaluatedSample(Row):
    """One policy's completion of one held-out prompt, and what was measured on it (None if not measured).

    `completion` is the answer and `thought` what a thinking model wrote before it; `answered` is False if it wrote
    nothing else. `tokens` counts all that was generated, the stop token included, and `token_ids` are those tokens.
    `score` is the reward model's. `p_better` is the judge's probability that the completion is better than the base
    model's. `kl_to_reference_k1` and `_k3` are sums over its tokens, in nats. `seed` and `provenance` are those of the
    completion. `judged_by` lists the principles that decided the verdict.
    """

    id: str
    prompt_id: str
    prompt: Conversation
    category: str
    policy: str
    completion: str
    finish_reason: FinishReason
    tokens: int
    score: float | None = None
    p_better: float | None = None
    kl_to_reference_k1: float | None = None
    kl_to_reference_k3: float | None = None
    seed: int | None = None
    provenance: str = ""
    judged_by: tuple[str, ...] = ()
    judge_provenance: str = ""
    thought: str = ""
    answered: bool = True
    token_ids: tuple[int, ...] = ()


class Part(Block):
    """A part of a report. It rejects figures that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CheckedPrinciple(Part):
    """A principle with a rule. `applies` lists the prompt categories it applies to; empty is all."""

    id: str
    rule: Rule
    applies: tuple[str, ...] = ()

    def applies_to(self, category: str) -> bool:
        return not self.applies or category in self.applies


class ConstitutionUsed(Part):
    """The constitution that steered the run, with those of its principles that have a rule."""

    id: str
    title: str
    digest: str
    checked: tuple[CheckedPrinciple, ...] = ()


class WinRate(Part):
    """Wins against the base model's completions of the same prompts. Ties count half; abstentions are left out.

    `share` is None if the judge abstained on every prompt.
    """

    share: Estimate | None = None
    wins: int
    losses: int
    ties: int
    abstained: int


class PolicyReport(Part):
    """One policy's figures. `rules` has the principles that applied to at least one prompt.

    `answered` is the share of the completions that have an answer; the others are neither scored nor judged. For
    best-of-n, an upper bound of the KL to the reference replaces the estimates, which need log-probabilities.
    """

    rules: dict[str, Estimate] = Field(default_factory=dict)
    all_rules: Estimate | None = None
    win_rate: WinRate | None = None
    reward: Estimate | None = None
    kl_to_reference_k1: Estimate | None = None
    kl_to_reference_k3: Estimate | None = None
    kl_to_reference_bound: float | None = None
    answered: float = 1.0
    text: TextFigures


class Report(Part):
    """All results of `evaluate`. `skipped` gives the reason for each missing figure, by its name in the table.

    `judge_probes` is the share of the constitution's probes that the judge answered correctly.
    """

    run: str
    base_model: str
    reference: str
    seed: int
    prompts: int
    settings: dict[str, Any]
    constitution: ConstitutionUsed | None = None
    judge: str | None = None
    judge_probes: Estimate | None = None
    policies: dict[str, PolicyReport]
    skipped: dict[str, str] = Field(default_factory=dict)


def read_report(directory: Path) -> Report:
    """The report in a published folder of `evaluate`.

    Raises:
        InputError: there is no report, or another version of align wrote it.
    """
    path = directory / REPORT
    try:
        return _in_recipe_order(Report.model_validate_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run `align run evaluate` with the run's recipe first") from None
    except ValidationError as error:
        faults = [Problem(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
        raise FileProblems(str(path), faults) from None


def read_samples(directory: Path) -> list[EvaluatedSample]:
    """The completions behind a published report."""
    return _read_evaluated(directory / SAMPLES)


def read_candidates(directory: Path) -> list[EvaluatedSample]:
    """The scored candidates of best-of-n.

    Raises:
        InputError: there are none, because the recipe does not set `evaluate.best_of`.
    """
    path = directory / CANDIDATES
    if not path.exists():
        raise InputError(f"{path}: no such file; set `evaluate.best_of` in the run's recipe and run it again")
    return _read_evaluated(path)


def _read_evaluated(path: Path) -> list[EvaluatedSample]:
    try:
        return list(read_rows(path, EvaluatedSample))
    except TypeError as error:
        raise InputError(f"{path}: written by another version of align ({error}); evaluate the run again") from None


def rule_outcomes(checked: Iterable[CheckedPrinciple], sample: EvaluatedSample) -> dict[str, float]:
    """For each principle that applies to the sample's prompt, 1.0 if the completion keeps its rule, else 0.0."""
    return {
        principle.id: float(principle.rule.holds(sample.completion))
        for principle in checked
        if principle.applies_to(sample.category)
    }


def _in_recipe_order(report: Report) -> Report:
    """The report with its policies in the recipe's order; in the file they are sorted by name."""
    names = dict.fromkeys((*report.settings.get("policies", ()), *report.policies))
    policies = {name: report.policies[name] for name in names if name in report.policies}
    return report.model_copy(update={"policies": policies})


def print_published_report(directory: Path, console: Console | None = None) -> None:
    """Print the report in a published folder, such as `runs/quickstart/style-asking-0a1b2c3d/evaluate`.

    Raises:
        InputError: as for `read_report`.
    """
    report = read_report(directory)
    print_report(report, model_paths(report, directory.parent), console)


def print_report(report: Report, paths: Mapping[str, str], console: Console | None = None) -> None:
    """Print the figures, the reasons for missing ones, and the path of each policy's model."""
    console = console or Console()
    print_sheet(report_sheet(report), console)
    for name, path in paths.items():
        console.print(f"{name:>6}  {path}", soft_wrap=True, highlight=False, markup=False)


def report_sheet(report: Report) -> Sheet:
    """A column for each policy and a row for each figure, with the 95% interval under the figure if it has one."""
    policies = report.policies.values()
    principles = [each.id for each in report.constitution.checked] if report.constitution else []
    rows = [
        *((name, *(share_text(each.rules.get(name)) for each in policies)) for name in principles),
        *([("mean of the rules", *(share_text(each.all_rules) for each in policies))] if len(principles) > 1 else []),
        ("win rate vs base", *(_win_rate_text(each.win_rate) for each in policies)),
        ("reward", *(number_text(each.reward) for each in policies)),
        (KL_ROW.format(report.reference), *(_divergence_text(each) for each in policies)),
        *((name, *(style.format(getattr(each.text, key)) for each in policies)) for name, key, style in _TEXT_ROWS),
    ]
    if any(each.answered < 1 for each in policies):
        rows.append(("with an answer", *(f"{each.answered:.0%}" for each in policies)))
    return Sheet(
        f"{report.run}: {report.prompts} held-out prompts, with 95% intervals",
        ("", *report.policies),
        tuple(row for row in rows if row[0] not in report.skipped),
        tuple(_remarks(report)),
    )


def model_paths(report: Report, run: Path) -> dict[str, str]:
    """The path of each policy's model: the base model's name, or a path in the run's folder or in the shared one.

    Best-of-n has no model.
    """
    paths = {}
    for name in (name for name, policy in report.policies.items() if policy.kl_to_reference_bound is None):
        model = stage_folder(run, name) / "model"
        found = str(model) if model.is_dir() else f"not found in {run}"
        paths[name] = report.base_model if name == BASE else found
    return paths


def share_text(estimate: Estimate | None) -> str:
    """A share in percent, with its interval on the next line."""
    if estimate is None:
        return "-"
    return f"{estimate.mean:.0%}\n{_interval(100 * estimate.low, 100 * estimate.high, '.0f')}"


def share_difference_text(estimate: Estimate | None) -> str:
    """A difference of shares in percentage points, with its interval on the next line."""
    if estimate is None:
        return "-"
    return f"{100 * estimate.mean:+.0f} pts\n{_interval(100 * estimate.low, 100 * estimate.high, '+.0f')}"


def number_text(estimate: Estimate | None, style: str = ".2f") -> str:
    """A figure, with its interval on the next line."""
    if estimate is None:
        return "-"
    return f"{estimate.mean:{style}}\n{_interval(estimate.low, estimate.high, style)}"


def _interval(low: float, high: float, style: str) -> str:
    return f"[{low:{style}}, {high:{style}}]"


def _remarks(report: Report) -> Iterator[str]:
    if report.judge and report.judge_probes:
        found = report.judge_probes
        right = f"right on {found.mean:.0%} of {found.n} probes {_interval(100 * found.low, 100 * found.high, '.0f')}"
        yield f"win rate by judge {report.judge}, {right}"
    for name, policy in report.policies.items():
        if policy.kl_to_reference_bound is not None:
            n = report.settings["best_of"]
            yield f"{name}: the completion with the highest reward among {n} by {report.reference}"
    yield from (f"no {name}: {reason}" for name, reason in report.skipped.items())


def _divergence_text(policy: PolicyReport) -> str:
    if policy.kl_to_reference_bound is not None:
        return f"≤ {policy.kl_to_reference_bound:.1f}"
    return number_text(policy.kl_to_reference_k1, ".1f")


def _win_rate_text(win_rate: WinRate | None) -> str:
    if win_rate is None:
        return "-"
    return share_text(win_rate.share) + (f"\n{win_rate.ties} tied" if win_rate.ties else "")
