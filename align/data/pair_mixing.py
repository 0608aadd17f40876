"""Mixes the AI judge's pairs with those that people labelled."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from align.data.pairs import read_pairs
from align.data.sources import Intake
from align.errors import InputError
from align.records import PreferencePair, digest, read_rows
from align.run.artefacts import read_manifest
from align.settings.data import PairSource

UNDECIDED = "undecided: "
"""Prefix of the counts of undecided comparisons in the manifest of `compare`; the reason follows."""
REMEDIES = {
    "cut": "raise `compare.sampling.max_new_tokens`",
    "identical": "raise `compare.sampling.temperature`",
    "empty": "use a larger model",
    "tie": "use another judge, or principles that discriminate better between answers",
}


def gather_pairs(
    ai: Path | None, human: Iterable[PairSource], intake: Intake, human_share: float | None = None
) -> list[PreferencePair]:
    """The distinct pairs of the judge in the file `ai`, followed by those of the human sources.

    Args:
        human_share: the share of human pairs in the mix, in (0, 1). Of the side that has too many, the pairs whose ids
            hash lowest are kept and the others counted. None takes all pairs.

    Raises:
        InputError: there is no pair, or as for `read_pairs`.
    """
    from_ai = list(read_rows(ai, PreferencePair)) if ai is not None else []
    from_humans = [pair for source in human for pair in read_pairs(source, intake)]
    ai_pairs = {pair.id: pair for pair in from_ai}
    human_pairs = {pair.id: pair for pair in from_humans if pair.id not in ai_pairs}
    repeated = len(from_ai) + len(from_humans) - len(ai_pairs) - len(human_pairs)
    intake.counts.update(pairs_ai=len(from_ai), pairs_human=len(from_humans), pairs_repeated=repeated)
    if human_share is not None:
        sizes = mix_sizes(len(ai_pairs), len(human_pairs), human_share)
        sides = [_lowest_hashes(side.values(), size) for side, size in zip((ai_pairs, human_pairs), sizes, strict=True)]
        intake.counts.update(
            pairs_ai_left_out=len(ai_pairs) - sizes[0], pairs_human_left_out=len(human_pairs) - sizes[1]
        )
    else:
        sides = [list(ai_pairs.values()), list(human_pairs.values())]
    if not any(sides):
        raise InputError(_no_pair(ai))
    return sides[0] + sides[1]


def _no_pair(ai: Path | None) -> str:
    """The error that there is no pair, with the reasons for undecided comparisons if the judge's manifest has them."""
    manifest = read_manifest(ai.parent) if ai is not None else None
    counts = manifest.counts if manifest is not None else {}
    reasons = {name.removeprefix(UNDECIDED): count for name, count in counts.items() if name.startswith(UNDECIDED)}
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    why = f" (undecided comparisons: {listed})" if listed else ""
    remedies = [REMEDIES[reason] for reason in reasons if reason in REMEDIES] or ["give human pairs as `human`"]
    return f"{ai or 'human pairs'}: no pair to train on{why}; {', or '.join(remedies)}"


def mix_sizes(ai: int, human: int, human_share: float) -> tuple[int, int]:
    """The largest (AI, human) numbers of pairs, out of those available, with about the given share of human pairs."""
    enough = round(ai * human_share / (1 - human_share))
    return (ai, enough) if enough <= human else (min(ai, round(human * (1 - human_share) / human_share)), human)


def _lowest_hashes(pairs: Iterable[PreferencePair], size: int) -> list[PreferencePair]:
    """The `size` pairs whose ids hash lowest, in their order. So a larger size extends a smaller one's selection."""
    every = list(pairs)
    kept = {pair.id for pair in sorted(every, key=lambda pair: digest(["mixed", pair.id]))[:size]}
    return [pair for pair in every if pair.id in kept]


def pairs_by_source(pairs: Iterable[PreferencePair]) -> dict[str, int]:
    """The number of pairs by their `source`: 'ai', 'revision', 'human', or the name of a human source."""
    return dict(sorted(Counter(pair.source for pair in pairs).items()))


def mix_faults(stage: str, ai: bool, human: tuple[PairSource, ...], human_share: float | None) -> list[str]:
    """What is wrong with a stage's `ai`, `human` and `human_share`, starting with the key at fault."""
    if not ai and not human:
        return [f"{stage}.human: no pairs to train on; give some, or set `ai: true`"]
    if human_share is not None and not (ai and human):
        return [f"{stage}.human_share: nothing to mix; give `human` pairs and set `ai: true`, or remove it"]
    return []
