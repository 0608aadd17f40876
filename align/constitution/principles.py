"""The principles of a constitution, with their worked examples and probes, and how one is drawn."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from align.constitution.rules import Rule
from align.records import Conversation, Message
from align.run.reproducibility import derive_seed
from align.settings.blocks import AboveZero, Block


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("string_too_short", "must not be empty")
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_not_blank)]
Id = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Language = Annotated[str, Field(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]+)*$")]
T = TypeVar("T")


class Turn(Block):
    """One message of a worked example's conversation."""

    role: Literal["user", "assistant"] = Field(description="the speaker")
    content: Text = Field(description="the message's text")


def _one_turn(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _one_text(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Texts = Annotated[tuple[Text, ...], BeforeValidator(_one_text, json_schema_input_type=Text | tuple[Text, ...])]
"""A list of texts. A single text may be written without the list."""
_Turns = Annotated[tuple[Turn, ...], Field(min_length=1)]
Turns = Annotated[_Turns, BeforeValidator(_one_turn, json_schema_input_type=Text | _Turns)]
"""A conversation up to the assistant's turn. A single user message may be written as a plain text."""


def conversation_of(turns: tuple[Turn, ...]) -> Conversation:
    return tuple(Message(turn.role, turn.content) for turn in turns)


class Probe(Block):
    """A test of a judge: two completions of a prompt, one of which clearly follows the principle better."""

    prompt: Text = Field(description="the user's message")
    better: Text = Field(description="a completion that follows the principle")
    worse: Text = Field(description="a completion that does not follow the principle")


class OwnExample(Block):
    """A worked example of critique and revision. It uses its principle's requests unless it sets its own."""

    prompt: Turns = Field(description="a text, or the conversation's turns")
    completion: Text = Field(description="the answer to be criticised")
    critique: Text = Field(description="the critique of the answer")
    revision: Text = Field(description="the revised answer")
    critique_request: Text | None = Field(None, description="replaces the principle's `critique`")
    revision_request: Text | None = Field(None, description="replaces the principle's `revision`")

    @property
    def conversation(self) -> Conversation:
        return conversation_of(self.prompt)


class Example(OwnExample):
    """A worked example at the top level of a constitution."""

    principle: str | None = Field(None, description="id of the principle that it illustrates; null is any")


class OwnComparison(Block):
    """A worked example of a choice between two completions."""

    prompt: Turns = Field(description="a text, or the conversation's turns")
    better: Text = Field(description="the better completion")
    worse: Text = Field(description="the other completion")
    reasoning: Text | None = Field(None, description="the reasoning before the choice; it must lead to `answer`")
    answer: Literal["A", "B"] | None = Field(None, description="the better completion; null takes A and B in turn")

    @model_validator(mode="after")
    def _reasoning_has_answer(self) -> Self:
        if self.reasoning and self.answer is None:
            raise ValueError("a `reasoning` needs its `answer`: set it to A or B, the letter of the better completion")
        return self

    @property
    def conversation(self) -> Conversation:
        return conversation_of(self.prompt)


class WorkedComparison(OwnComparison):
    """A worked choice at the top level of a constitution."""

    principle: str | None = Field(None, description="id of the principle that it illustrates; null draws one")


_HAS_INSTRUCTION: list[JsonValue] = [
    {"required": [key], "properties": {key: {"type": "string", "minLength": 1}}}
    for key in ("text", "critique", "compare")
]


class Principle(Block):
    """One principle: its instruction, the requests that revise a completion by it, and the question put to judges."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": _HAS_INSTRUCTION,
            "dependentRequired": {"critique": ["revision"], "revision": ["critique"]},
        }
    )

    id: Id = Field(description="unique name: lower-case words joined by hyphens")
    text: str = Field("", description="the principle as an instruction to the assistant")
    opposite: Text | None = Field(None, description="the opposite instruction, which the `contrast` judge needs")
    critique: Text | None = Field(None, description="the request that asks for a critique")
    revision: Text | None = Field(None, description="the request that asks for a revision")
    compare: Text | None = Field(None, description="the question that the `choice` judge is asked")
    rule: Rule | None = Field(None, description="a check on completions that a program makes")
    tags: tuple[Text, ...] = Field((), description="labels by which the `include` and `exclude` of a child select")
    language: Language | None = Field(None, description="language of its texts, such as ja; null is the constitution's")
    tier: str | None = Field(None, description="one of `tiers`; in a conflict the earlier tier decides")
    framing: Literal["negative", "positive", "neutral"] = Field("neutral", description="a note for readers")
    hard: bool = Field(
        False, description="decides before every tier where its verdict is clear; breaking its rule loses"
    )
    weight: AboveZero = Field(1.0, description="its weight in judging within its tier, and in drawing a principle")
    applies: tuple[Text, ...] = Field((), description="the prompt categories it applies to; empty is all")
    sources: Texts | None = Field(None, description="folders of documents that replace the constitution's; [] is none")
    rationale: str | None = Field(None, description="the reason for the principle; a note for readers")
    probes: tuple[Probe, ...] = Field((), description="tests that a judge takes before it labels")
    examples: tuple[OwnExample, ...] = Field((), description="worked examples of critique and revision")
    comparisons: tuple[OwnComparison, ...] = Field((), description="worked examples of a choice")

    @model_validator(mode="after")
    def _has_instruction(self) -> Self:
        if (self.critique is None) != (self.revision is None):
            raise ValueError("critique and revision go together; give both or none")
        if not (self.text.strip() or self.critique or self.compare):
            raise ValueError("needs a `text`: the principle as an instruction to the assistant")
        return self

    def applies_to(self, category: str) -> bool:
        return not self.applies or category in self.applies

    def keeps_rule(self, text: str) -> bool:
        """Whether the text keeps the principle's rule; True for a principle without a rule."""
        return self.rule is None or self.rule.holds(text)

    @property
    def requests(self) -> tuple[str, str] | None:
        """The requests for a critique and for a revision; None for a principle that only compares."""
        if self.critique and self.revision:
            return self.critique, self.revision
        if not self.text:
            return None
        templates = in_language(TEMPLATES, self.language)
        critique, revision = (templates[key].replace(PLACEHOLDER, self.text) for key in ("critique", "revision"))
        return critique, revision

    @property
    def question(self) -> str | None:
        """What the `choice` judge is asked; None for a principle that only revises."""
        if self.compare or not self.text:
            return self.compare
        return in_language(TEMPLATES, self.language)["compare"].replace(PLACEHOLDER, self.text)


PLACEHOLDER = "{principle}"
"""Filled with `str.replace`, never with `format`, because a principle's text may contain braces."""
TEMPLATES: dict[str, dict[str, str]] = {
    "en": {
        "critique": "Point out where the assistant's last answer does not follow this principle: {principle}",
        "revision": "Rewrite the assistant's last answer so that it follows this principle: {principle} "
        "Write only the rewritten answer.",
        "compare": "Choose the response that follows this principle better: {principle}",
    },
    "ja": {
        "critique": "アシスタントの直前の回答が次の原則に従っていない点を指摘してください。原則：{principle}",
        "revision": "アシスタントの直前の回答を、次の原則に従うように書き直してください。原則：{principle} "
        "書き直した回答だけを書いてください。",
        "compare": "次の原則によりよく従っている回答を選んでください。原則：{principle}",
    },
}
"""The requests and the question, by language, for a principle that gives only its `text`."""


def in_language(table: Mapping[str, T], language: str | None) -> T:
    """The table's entry for a language (`ja-JP` counts as `ja`), or the English one if there is none."""
    return table.get((language or "en").partition("-")[0].lower(), table["en"])


def draw_principle(
    principles: Sequence[Principle], seed: int, *names: str | int, category: str = ""
) -> Principle | None:
    """Draw one of the principles that apply to the category, in proportion to their weights; None if none applies.

    The draw depends on `seed` and `names` alone; different names give independent draws.
    """
    applying = [principle for principle in principles if principle.applies_to(category)]
    point = derive_seed(seed, *names) / 2**63 * sum(principle.weight for principle in applying)
    for principle in applying:
        point -= principle.weight
        if point < 0:
            return principle
    return applying[-1] if applying else None
