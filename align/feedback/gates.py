"""Gates that stop a stage before training if too large a share of its generated rows has a fault.

Each row can be sound while the set is not: a model trained on its own revisions may collapse into ending every answer
with the same sentence, or into repeated text (arXiv 2504.04918). The manifest records the shares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from align.errors import GateClosed
from align.feedback.filters import has_emoji, repeats_itself
from align.figures.sentences import fold, sentences
from align.figures.text_metrics import words
from align.run import processes
from align.run.streaming import scratch_database
from align.settings.blocks import Block, Fraction, Positive

EDGE_WORDS = 5
UNSPACED = 3
"""Characters that count as one word in a script without spaces between words."""
SHOWN_EXAMPLES = 3
Limit = Fraction | None


class TextGatesBlock(Block):
    """The largest share of the training texts that may have each fault; null turns a gate off."""

    same_closing: Limit = Field(0.25, description="texts that end with the commonest closing sentence, word for word")
    same_ending: Limit = Field(0.25, description="texts that end with the commonest last five words")
    same_opening: Limit = Field(0.3, description="texts that begin with the commonest first five words")
    emoji: Limit = Field(0.25, description="texts with emoji")
    repetition: Limit = Field(0.05, description="texts that repeat themselves")
    min_rows: Positive = Field(50, description="over fewer rows a share is reported but closes no gate")


class ReviseGatesBlock(TextGatesBlock):
    """Limits on the training texts, and on the revisions before they were filtered and judged."""

    benign_refused: Limit = Field(0.2, description="`benign` prompts that are refused")
    benign: tuple[str, ...] = Field((), description="prompt files or categories whose prompts should not be refused")
    refusal_only: Limit = Field(0.5, description="revisions that refuse and say nothing else (evasiveness)")
    cut: Limit = Field(0.5, description="revisions that the length limit cut")
    not_accepted: Limit = Field(0.98, description="samples without an accepted revision")


class CompareGatesBlock(Block):
    """The largest share of comparisons that may have each fault; null turns a gate off."""

    cut: Limit = Field(0.8, description="comparisons with a completion that the length limit cut")
    identical: Limit = Field(0.8, description="comparisons of two identical completions")
    min_rows: Positive = Field(50, description="over fewer rows a share is reported but closes no gate")


FAULTS = {
    "same_closing": ("texts end with the same sentence", "change the principles or examples that lead to it"),
    "same_ending": ("texts end with the same five words", "change the principles or examples that lead to it"),
    "same_opening": ("texts begin with the same five words", "change the principles or examples that lead to it"),
    "emoji": ("texts have emoji", "add a principle against emoji, or lower sampling.temperature"),
    "repetition": ("texts repeat themselves", "use a larger model, or change sampling.temperature"),
    "benign_refused": ("benign prompts are refused", "add principles against overreacting, or add benign prompts"),
    "refusal_only": ("revisions refuse and say nothing else", "add principles that ask to explain, or benign prompts"),
    "cut": ("completions were cut by the length limit", "raise sampling.max_new_tokens"),
    "not_accepted": ("samples have no accepted revision", "see rejected.jsonl; use a larger model or fewer principles"),
    "identical": ("comparisons have two identical completions", "raise sampling.temperature"),
}
"""For each gate, the words that follow a share of rows in its message, and the remedy."""


@dataclass
class FaultShare:
    """How many rows have a fault, and the first few of them as examples."""

    count: int = 0
    rows: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, text: str, faulty: bool) -> None:
        self.rows += 1
        self.count += faulty
        if faulty and len(self.examples) < SHOWN_EXAMPLES:
            self.examples.append(text)

    @property
    def value(self) -> float:
        return self.count / self.rows if self.rows else 0.0

    def figures(self) -> dict[str, float]:
        return {"share": self.value, "count": self.count, "rows": self.rows}


class TextFaultShares:
    """Counts the faults that `TextGatesBlock` limits, one text at a time. The counts are kept on disk."""

    def __init__(self) -> None:
        self._shares = {name: FaultShare() for name in ("emoji", "repetition")}
        self._edges = scratch_database(
            "create table edges (kind text, edge text, count integer, examples text, primary key (kind, edge))"
        )
        self._rows = 0

    def add(self, text: str) -> None:
        """Count a text that would be trained on."""
        self._rows += 1
        self._shares["emoji"].add(text, has_emoji(text))
        self._shares["repetition"].add(text, repeats_itself(text))
        closing = fold(found[-1]) if (found := sentences(text)) else ""
        self._count_edge("same_closing", closing)
        plain_words = [word for word in words(fold(text)) if word[0].isalnum()]
        self._count_edge("same_ending", " ".join(plain_words[-_edge_length(plain_words[-EDGE_WORDS:]) :]))
        self._count_edge("same_opening", " ".join(plain_words[: _edge_length(plain_words[:EDGE_WORDS])]))

    def shares(self) -> dict[str, FaultShare]:
        return self._shares | {name: self._commonest(name) for name in ("same_closing", "same_ending", "same_opening")}

    def _count_edge(self, kind: str, edge: str) -> None:
        self._edges.execute(
            "insert into edges values (?, ?, 1, '') on conflict do update set count = count + 1", (kind, edge)
        )

    def _commonest(self, kind: str) -> FaultShare:
        found = self._edges.execute(
            "select edge, count from edges where kind = ? order by count desc, edge limit 1", (kind,)
        ).fetchone()
        return FaultShare(found[1], self._rows, [found[0]]) if found else FaultShare()


def _edge_length(edge: Sequence[str]) -> int:
    """How many items of `words` make up an edge like this one: `words` splits kana and Han into single characters."""
    return EDGE_WORDS * (UNSPACED if all(len(word) == 1 for word in edge) else 1)


def check_gates(stage: str, block: Block, shares: Mapping[str, FaultShare], place: Path | str) -> None:
    """Stop before anything is trained on a set with a share over its limit. Over too few rows it is only reported.

    Args:
        place: where the rows are.

    Raises:
        GateClosed: the text names each closed gate with its share, limit, examples and remedy, and the file.
    """
    least = getattr(block, "min_rows", 1)
    closed, reported = [], []
    for name, share in shares.items():
        limit = getattr(block, name)
        if limit is None or share.value <= limit:
            continue
        if share.rows < least:
            # A single row of few exceeds most limits, but says nothing about the set.
            if share.count == 1:
                continue
            reported.append(f"{name} {share.value:.1%} of {share.rows} (limit {limit:.1%})")
            continue
        fault, remedy = FAULTS[name]
        shown = "; ".join(repr(text if len(text) <= 100 else f"{text[:99]}…") for text in share.examples)
        closed.append(
            f"gate {stage}.gates.{name} is closed: {share.value:.1%} of {share.rows} {fault}, and the "
            f"limit is {limit:.1%}" + (f" ({shown})" if shown else "") + f"; {remedy}"
        )
    if reported and processes.is_first():
        print(
            f"{stage}.gates: over the limit, but no gate closes with fewer than {least} rows: {', '.join(reported)}",
            flush=True,
        )
    if closed:
        raise GateClosed(
            "\n".join(closed) + f"\nThe rows are in {place}; nothing was trained on them. To use them anyway, raise "
            "the limit or set it to null, and run again: the generated rows are kept."
        )


def gate_figures(shares: Mapping[str, FaultShare]) -> dict[str, Any]:
    """The shares, for a manifest."""
    return {name: share.figures() for name, share in sorted(shares.items())}
