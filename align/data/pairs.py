"""Reads preference pairs in every layout of `layouts`; the layout is recognised row by row.

Where answers have scores, pairs are made of them: of several answers in a row the best and the worst, of rows with one
answer each the best and the worst of a prompt, of answers labelled good or bad each good one with a bad one.
"""

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any, Literal, TypeVar

from align.data.demonstrations import no_usable_row, whole_messages
from align.data.layouts import RANKED, canonical
from align.data.reading import Row
from align.data.row_conversations import category_of, is_answered, number, require, split_answer, whole_conversation
from align.data.sources import Intake, usable
from align.errors import InputError
from align.records import PreferencePair, as_dicts, digest, pair_id
from align.settings.data import PairSource

T = TypeVar("T")
Which = Literal["best_worst", "all"]
Rated = tuple[str, dict[str, Any]]
"""A row with one answer and its score, and its place."""


def read_pairs(source: PairSource, intake: Intake | None = None) -> list[PreferencePair]:
    """The distinct preference pairs of a source, in its order; those made of several rows come last.

    A pair is left out if its conversations differ before the last turn, if the last turn does not answer a user, if
    its completions are equal or empty, or if its scores are equal or say the opposite and the source asks for no soft
    labels; `intake` counts it under `pairs_<reason>`. The soft label is the `probability` column, or what the source's
    `margin_scale` makes of scores, or else 1.

    Raises:
        InputError: the file or dataset is missing, more rows are unusable than the source allows, or no pair is usable.
    """
    reader = _Reader(source, Intake() if intake is None else intake)
    pairs: dict[str, PreferencePair] = {}
    for pair in reader.pairs():
        if pair.id in pairs:
            reader.intake.counts["pairs_repeated"] += 1
        else:
            pairs[pair.id] = pair
    if not pairs:
        raise InputError(no_usable_row(source, reader.intake))
    return list(pairs.values())


class _Reader:
    """Makes pairs of rows; rows with one answer wait for others of their prompt."""

    def __init__(self, source: PairSource, intake: Intake) -> None:
        self.source = source
        self.intake = intake
        self.waiting: dict[str, list[Rated]] = {}

    def pairs(self) -> Iterator[PreferencePair]:
        yield from usable(self.source, self._of_row, self.intake, "pairs")
        for rated in self.waiting.values():
            yield from self._of_rated(rated)

    def _of_row(self, row: Row, place: str, path: str) -> Iterator[PreferencePair]:
        form = canonical(row, place)
        if RANKED in form:
            for pair in ranked_rows(form, place, self.source.ranked_pairs):
                yield from self._kept(pair, place)
        elif "score" in form and form.get("chosen") is None:
            prompt, answer = _rated(form, place)
            self.waiting.setdefault(digest(as_dicts(prompt)), []).append(
                (place, {**form, "messages": None, "prompt": as_dicts(prompt), "completion": [answer.as_dict()]})
            )
        else:
            yield from self._kept(form, place)

    def _of_rated(self, rated: list[Rated]) -> Iterator[PreferencePair]:
        matched, alone = match_rated(rated, self.source.ranked_pairs)
        for place, row in alone:
            self.intake.leave_out("pairs_without_a_counterpart", place, row)
        for (place, better), (_, worse) in matched:
            try:
                yield from self._kept(_joined(better, worse), place)
            except InputError as error:
                self.intake.leave_out("pairs_unusable", place, better, str(error))

    def _kept(self, row: Row, place: str) -> Iterator[PreferencePair]:
        pair = pair_of(row, place, self.source)
        if isinstance(pair, str):
            self.intake.leave_out(f"pairs_{pair}", place, row)
        else:
            self.intake.places.setdefault(pair.id, place)
            yield pair


def match_rated(rated: list[Rated], which: Which) -> tuple[list[tuple[Rated, Rated]], list[Rated]]:
    """(The better and the worse) of one prompt's rows with an answer each, and the rows that have no counterpart.

    Answers labelled good are matched with those labelled bad in their order; scored ones by their scores.
    """
    labelled = [each for each in rated if each[1].get("is_label")]
    scored = sorted((each for each in rated if not each[1].get("is_label")), key=lambda each: -each[1]["score"])
    good, bad = ([each for each in labelled if bool(each[1]["score"]) == wanted] for wanted in (True, False))
    matched = list(zip(good, bad, strict=False))
    alone = good[len(matched) :] + bad[len(matched) :]
    if len(scored) == 1:
        return matched, alone + scored
    return matched + couples(scored, which), alone


def couples(ordered: list[T], which: Which) -> list[tuple[T, T]]:
    """Of answers from the best to the worst, the pairs that the recipe asks for."""
    if which == "all" or not ordered:
        return list(combinations(ordered, 2))
    return [(ordered[0], ordered[-1])]


def ranked_rows(row: dict[str, Any], place: str, which: Which) -> list[dict[str, Any]]:
    """The pairs of a row with several answers, as rows.

    Raises:
        InputError: it has fewer than two answers, or a score is no number.
    """
    kept = {key: value for key, value in row.items() if key != RANKED}
    scored = [(text, number(score, "score", place)) for text, score in row[RANKED]]
    if len(scored) < 2:
        raise InputError(f"{place}: has {len(scored)} answers, and a pair takes two")
    scored.sort(key=lambda answer: -answer[1])
    return [
        {**kept, "chosen": chosen, "rejected": rejected, "score_chosen": high, "score_rejected": low}
        for (chosen, high), (rejected, low) in couples(scored, which)
    ]


def pair_of(row: Row, place: str, source: PairSource) -> PreferencePair | str:
    """The row's pair, or the reason to leave it out."""
    require(row, ("chosen", "rejected"), place)
    prompt, chosen = split_answer(whole_conversation(row, "chosen", place), place)
    other_prompt, rejected = split_answer(whole_conversation(row, "rejected", place), place)
    if prompt != other_prompt:
        return "with_different_contexts"
    if not is_answered(prompt, chosen) or not is_answered(prompt, rejected):
        return "with_odd_turns"
    if not chosen.content.strip() or not rejected.content.strip():
        return "with_empty_completion"
    if chosen == rejected:
        return "with_equal_completions"
    probability = soft_label(row, place, source.margin_scale)
    if isinstance(probability, str):
        return probability
    if probability < 0.5:
        chosen, rejected, probability = rejected, chosen, 1 - probability
    return PreferencePair(
        id=pair_id(prompt, chosen, rejected),
        prompt=prompt,
        chosen=(chosen,),
        rejected=(rejected,),
        probability=probability,
        source=source.name or str(row.get("source") or "human"),
        category=category_of(row),
    )


def soft_label(row: Row, place: str, margin_scale: float | None) -> float | str:
    """The probability that `chosen` is better, or the reason to leave the pair out.

    Raises:
        InputError: the `probability`, a score or the margin is no number, or the first below one half.
    """
    if row.get("probability") is not None:
        return _probability(row, place)
    margin = _margin(row, place)
    if margin is None:
        return 1.0
    if margin_scale is not None:
        # The hyperbolic tangent overflows nowhere.
        return 0.5 + 0.5 * math.tanh(margin_scale * margin / 2)
    if margin == 0:
        return "with_equal_scores"
    return 1.0 if margin > 0 else "scored_the_other_way"


def _margin(row: Row, place: str) -> float | None:
    if row.get("margin") is not None:
        return number(row["margin"], "margin", place)
    if row.get("score_chosen") is None or row.get("score_rejected") is None:
        return None
    return number(row["score_chosen"], "score_chosen", place) - number(row["score_rejected"], "score_rejected", place)


def _probability(row: Row, place: str) -> float:
    value = row["probability"]
    value = number(value, "probability", place) if isinstance(value, str) else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.5 <= value <= 1:
        raise InputError(
            f"{place}: `probability`, that `chosen` is better, must lie in [0.5, 1], got {value!r}; "
            "if it is lower, swap `chosen` and `rejected`"
        )
    return float(value)


def _rated(row: dict[str, Any], place: str) -> tuple[Any, Any]:
    row["score"] = number(row["score"], "score", place)
    if row.get("messages") is not None:
        return split_answer(whole_messages(row, place), place)
    require(row, ("prompt", "completion"), place)
    return split_answer(whole_conversation(row, "completion", place), place)


def _joined(better: dict[str, Any], worse: dict[str, Any]) -> dict[str, Any]:
    """Two rows of one prompt as a pair. Labels have no margin."""
    kept = {key: value for key, value in better.items() if key not in ("completion", "score", "is_label", "messages")}
    sides = {"chosen": better["completion"], "rejected": worse["completion"]}
    scores = {} if better.get("is_label") else {"score_chosen": better["score"], "score_rejected": worse["score"]}
    return {**kept, **sides, **scores}
