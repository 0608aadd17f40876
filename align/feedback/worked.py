"""Worked choices that a judge is shown before a question, each with a principle of its own (Bai et al. 2022, 4.1).

They are the same in whichever order the completions come, and whatever is asked beside them.
"""

from dataclasses import dataclass

from align.config import JudgeBlock
from align.constitution import Constitution, WorkedComparison, draw_principle
from align.records import Conversation, as_dicts, digest
from align.repro import derive_seed


@dataclass(frozen=True)
class Shown:
    """A choice as it is shown: the completions in their places, and of a worked one the reasoning and the letter."""

    conversation: Conversation
    question: str
    places: tuple[str, str]
    reasoning: str = ""
    answer: str = ""


def usable_comparisons(constitution: Constitution, block: JudgeBlock) -> list[WorkedComparison]:
    """Those that can be shown: with a chain of thought, those that reason."""
    return [each for each in constitution.worked_comparisons if each.reasoning or not block.chain_of_thought]


def worked_choices(
    constitution: Constitution, block: JudgeBlock, seed: int, conversation: Conversation, category: str
) -> list[Shown]:
    """The first `block.examples` worked choices, without those of the very conversation that is asked about.

    A probe may be a worked choice too, and would otherwise be shown with its answer. A choice that says no principle
    takes one that is drawn; where it says no letter, the better completion takes A and B in turn.
    """
    asked = digest(as_dicts(conversation))
    others = [each for each in usable_comparisons(constitution, block) if each.conversation != conversation]
    first = derive_seed(seed, "place", asked)
    return [
        _shown(constitution, each, "AB"[(first + number) % 2], (seed, "example", asked, number), category)
        for number, each in enumerate(others[: block.examples])
    ]


def _shown(
    constitution: Constitution,
    comparison: WorkedComparison,
    letter: str,
    draw: tuple[int, str, str, int],
    category: str,
) -> Shown:
    answer = comparison.answer or letter
    better, worse = comparison.better, comparison.worse
    return Shown(
        comparison.conversation,
        _question(constitution, comparison, draw, category),
        (better, worse) if answer == "A" else (worse, better),
        comparison.reasoning or "",
        answer,
    )


def _question(
    constitution: Constitution, comparison: WorkedComparison, draw: tuple[int, str, str, int], category: str
) -> str:
    """What is asked about a worked choice: by its own principle, or by one that is drawn."""
    if comparison.principle:
        principle = constitution.principle(comparison.principle)
    else:
        asking = [each for each in constitution.principles if each.question]
        principle = draw_principle(asking, *draw, category=category) or asking[0]
    return principle.question or ""
