"""Gates between generated rows and the training on them: shares over a whole set that, over their limit, end the stage.

A row can be sound while the set is not: one closing sentence under everything, or repeated text, is what a model that
is trained on its own revisions collapses into (arXiv 2504.04918). The figures stand in the manifest, passed or not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from align.errors import GateClosed
from align.feedback.filters import goes_in_circles, has_emoji
from align.figures.sentences import fold, sentences
from align.figures.text_metrics import words
from align.run import processes
from align.run.streaming import scratch_database
from align.settings.blocks import Block, Fraction, Positive

EDGE_WORDS = 5
UNSPACED = 3
"""Characters that count as a word where a script puts no spaces between words."""
SHOWN = 3
Limit = Fraction | None


class TextGatesBlock(Block):
    """The largest share of the texts to train on that each fault may have; null turns a gate off."""

    same_closing: Limit = Field(0.25, description="the commonest closing sentence, word for word")
    same_ending: Limit = Field(0.25, description="the commonest last five words")
    same_opening: Limit = Field(0.3, description="the commonest first five words")
    emoji: Limit = Field(0.25, description="texts with emoji")
    repetition: Limit = Field(0.05, description="texts that go round in circles")
    min_rows: Positive = Field(50, description="a share of fewer rows is told and closes no gate")


class ReviseGatesBlock(TextGatesBlock):
    """Those of the texts, and of the revisions that were made."""

    benign_refused: Limit = Field(0.2, description="of the `benign` prompts, those that are refused")
    benign: tuple[str, ...] = Field((), description="prompt files or categories that nothing is to be refused of")
    refusal_only: Limit = Field(0.5, description="revisions that refuse and say nothing else (evasiveness)")
    cut: Limit = Field(0.5, description="revisions that the length limit cut")
    not_accepted: Limit = Field(0.98, description="samples without an accepted revision")


class CompareGatesBlock(Block):
    """The largest share of comparisons that each fault may have; null turns a gate off."""

    cut: Limit = Field(0.8, description="comparisons with a completion that the length limit cut")
    identical: Limit = Field(0.8, description="comparisons of two completions that are alike")
    min_rows: Positive = Field(50, description="a share of fewer rows is told and closes no gate")


WORDS_FOR = {
    "same_closing": "texts close with the same sentence",
    "same_ending": "texts end with the same five words",
    "same_opening": "texts open with the same five words",
    "emoji": "texts have emoji",
    "repetition": "texts go round in circles",
    "benign_refused": "benign prompts are refused",
    "refusal_only": "revisions refuse and say nothing else",
    "cut": "completions were cut by the length limit",
    "not_accepted": "samples have no accepted revision",
    "identical": "comparisons are of two completions that are alike",
}
REMEDIES = {
    "same_closing": "change the principles or worked examples that ask for it",
    "same_ending": "change the principles or worked examples that ask for it",
    "same_opening": "change the principles or worked examples that ask for it",
    "emoji": "add a principle against them, or lower sampling.temperature",
    "repetition": "use a larger model, or change sampling.temperature",
    "benign_refused": "add principles against overreacting, or benign prompts",
    "refusal_only": "add principles that ask to explain or to offer help, or benign prompts",
    "cut": "raise sampling.max_new_tokens",
    "not_accepted": "read the reasons in rejected.jsonl, and use a larger model or fewer principles",
    "identical": "raise sampling.temperature",
}


@dataclass
class Share:
    """How many of the rows have a fault, with the first of them."""

    count: int = 0
    rows: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, text: str, faulty: bool) -> None:
        self.rows += 1
        self.count += faulty
        if faulty and len(self.examples) < SHOWN:
            self.examples.append(text)

    @property
    def value(self) -> float:
        return self.count / self.rows if self.rows else 0.0

    def figures(self) -> dict[str, float]:
        return {"share": self.value, "count": self.count, "rows": self.rows}


class TextShares:
    """The shares of a set of texts that `TextGatesBlock` limits, a text at a time; what is counted lies on disk."""

    def __init__(self) -> None:
        self._shares = {name: Share() for name in ("emoji", "repetition")}
        self._edges = scratch_database(
            "create table edges (kind text, edge text, count integer, examples text, primary key (kind, edge))"
        )
        self._rows = 0

    def add(self, text: str) -> None:
        """A text that would be trained on."""
        self._rows += 1
        self._shares["emoji"].add(text, has_emoji(text))
        self._shares["repetition"].add(text, goes_in_circles(text))
        closing = fold(found[-1]) if (found := sentences(text)) else ""
        self._count_edge("same_closing", closing)
        said = [word for word in words(fold(text)) if word[0].isalnum()]
        self._count_edge("same_ending", " ".join(said[-_edge_length(said[-EDGE_WORDS:]) :]))
        self._count_edge("same_opening", " ".join(said[: _edge_length(said[:EDGE_WORDS])]))

    def shares(self) -> dict[str, Share]:
        return self._shares | {name: self._commonest(name) for name in ("same_closing", "same_ending", "same_opening")}

    def _count_edge(self, kind: str, edge: str) -> None:
        self._edges.execute(
            "insert into edges values (?, ?, 1, '') on conflict do update set count = count + 1", (kind, edge)
        )

    def _commonest(self, kind: str) -> Share:
        found = self._edges.execute(
            "select edge, count from edges where kind = ? order by count desc, edge limit 1", (kind,)
        ).fetchone()
        return Share(found[1], self._rows, [found[0]]) if found else Share()


def _edge_length(edge: Sequence[str]) -> int:
    """How many words an edge that begins like this has; `words` gives kana and Han characters one by one."""
    return EDGE_WORDS * (UNSPACED if all(len(word) == 1 for word in edge) else 1)


def check_gates(stage: str, block: Block, shares: Mapping[str, Share], place: Path | str) -> None:
    """Stop before anything is trained on a set with a share over its limit; one of too few rows is told instead.

    Args:
        place: where the rows are.

    Raises:
        GateClosed: with each such gate, its figure and limit, examples, the file and the remedies.
    """
    least = getattr(block, "min_rows", 1)
    closed, told = [], []
    for name, share in shares.items():
        limit = getattr(block, name)
        if limit is None or share.value <= limit:
            continue
        if share.rows < least:
            # One row of three is over most limits, and says nothing of the set.
            if share.count == 1:
                continue
            told.append(f"{name} {share.value:.1%} of {share.rows} (limit {limit:.1%})")
            continue
        shown = "; ".join(repr(text if len(text) <= 100 else f"{text[:99]}…") for text in share.examples)
        closed.append(
            f"gate {stage}.gates.{name} is closed: {share.value:.1%} of {share.rows} {WORDS_FOR[name]}, and the "
            f"limit is {limit:.1%}" + (f" ({shown})" if shown else "") + f"; {REMEDIES[name]}"
        )
    if told and processes.is_first():
        print(f"{stage}.gates: over the limit, but left open under {least} rows: {', '.join(told)}", flush=True)
    if closed:
        raise GateClosed(
            "\n".join(closed) + f"\nThe rows are in {place}; nothing was trained on them. To go on with them all the "
            f"same raise the limit, or set it to null: what was generated is kept."
        )


def gate_figures(shares: Mapping[str, Share]) -> dict[str, Any]:
    """The shares for a manifest."""
    return {name: share.figures() for name, share in sorted(shares.items())}
