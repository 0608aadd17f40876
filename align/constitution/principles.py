"""Principles, with the worked examples and probes that belong to them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from align.constitution.rules import Rule
from align.records import Conversation, Message
from align.settings.blocks import AboveZero, Block


def _with_words(text: str) -> str:
    """Spaces alone say nothing."""
    if not text.strip():
        raise PydanticCustomError("string_too_short", "must not be empty")
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_with_words)]
Id = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Language = Annotated[str, Field(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]+)*$")]
T = TypeVar("T")


class Turn(Block):
    """One message of a worked example's conversation."""

    role: Literal["user", "assistant"] = Field(description="who speaks")
    content: Text = Field(description="what is said")


def _one_turn(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _one_text(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Texts = Annotated[tuple[Text, ...], BeforeValidator(_one_text, json_schema_input_type=Text | tuple[Text, ...])]
"""A list of texts, or one text alone."""
_Turns = Annotated[tuple[Turn, ...], Field(min_length=1)]
Turns = Annotated[_Turns, BeforeValidator(_one_turn, json_schema_input_type=Text | _Turns)]
"""A conversation up to the assistant's turn, or its one message alone."""


def conversation_of(turns: tuple[Turn, ...]) -> Conversation:
    return tuple(Message(turn.role, turn.content) for turn in turns)


class Probe(Block):
    """Two completions of a prompt of which one plainly follows the principle better: does a judge see it?"""

    prompt: Text = Field(description="what the user says")
    better: Text = Field(description="a completion that follows the principle")
    worse: Text = Field(description="one that does not")


class OwnExample(Block):
    """A worked example of critique and revision; without requests of its own it takes those of its principle."""

    prompt: Turns = Field(description="a text, or the conversation's turns")
    completion: Text = Field(description="the answer that is criticised")
    critique: Text = Field(description="what is wrong with it")
    revision: Text = Field(description="the answer, rewritten")
    critique_request: Text | None = Field(None, description="instead of the principle's `critique`")
    revision_request: Text | None = Field(None, description="instead of the principle's `revision`")

    @property
    def conversation(self) -> Conversation:
        return conversation_of(self.prompt)


class Example(OwnExample):
    """A worked example that stands outside its principle."""

    principle: str | None = Field(None, description="id of the principle that it shows; none is any")


class OwnComparison(Block):
    """A worked example of a choice between two completions."""

    prompt: Turns = Field(description="a text, or the conversation's turns")
    better: Text = Field(description="the completion to choose")
    worse: Text = Field(description="the other")
    reasoning: Text | None = Field(None, description="what is thought before the choice; names `answer`")
    answer: Literal["A", "B"] | None = Field(None, description="where the better one stands; in turn if null")

    @model_validator(mode="after")
    def _reasons_for_an_answer(self) -> Self:
        if self.reasoning and self.answer is None:
            raise ValueError("a reasoning names its `answer`: set it to A or B, where the better one stands")
        return self

    @property
    def conversation(self) -> Conversation:
        return conversation_of(self.prompt)


class WorkedComparison(OwnComparison):
    """A worked choice that stands outside its principle."""

    principle: str | None = Field(None, description="id of the principle that it shows; one is drawn if null")


_SAYS_SOMETHING: list[JsonValue] = [
    {"required": [key], "properties": {key: {"type": "string", "minLength": 1}}}
    for key in ("text", "critique", "compare")
]


class Principle(Block):
    """One principle: what it asks, how completions are revised towards it, and how judges are asked about it."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": _SAYS_SOMETHING,
            "dependentRequired": {"critique": ["revision"], "revision": ["critique"]},
        }
    )

    id: Id = Field(description="its name: lower-case words with hyphens")
    text: str = Field("", description="the principle as an instruction to the assistant")
    opposite: Text | None = Field(None, description="the opposite instruction, for the contrast judge")
    critique: Text | None = Field(None, description="the request for a critique")
    revision: Text | None = Field(None, description="the request for a revision")
    compare: Text | None = Field(None, description="the question put to a choosing judge")
    rule: Rule | None = Field(None, description="a check by program")
    tags: tuple[Text, ...] = Field((), description="what a child's `include` and `exclude` choose by")
    language: Language | None = Field(None, description="of its texts, such as ja; the constitution's by default")
    tier: str | None = Field(None, description="one of `tiers`; an earlier tier decides a conflict")
    framing: Literal["negative", "positive", "neutral"] = Field("neutral", description="for the reader")
    hard: bool = Field(False, description="decides before every tier, and its rule's violation rejects")
    weight: AboveZero = Field(1.0, description="how much it counts within its tier, and how often it is drawn")
    applies: tuple[Text, ...] = Field((), description="categories of prompts; empty is all")
    sources: Texts | None = Field(None, description="folders of documents, instead of the constitution's; [] is none")
    rationale: str | None = Field(None, description="why; for the reader")
    probes: tuple[Probe, ...] = Field((), description="what a judge is tested on before it labels")
    examples: tuple[OwnExample, ...] = Field((), description="worked critiques and revisions by this principle")
    comparisons: tuple[OwnComparison, ...] = Field((), description="worked choices by this principle")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if (self.critique is None) != (self.revision is None):
            raise ValueError("critique and revision go together; give both or none")
        if not (self.text.strip() or self.critique or self.compare):
            raise ValueError("needs a `text`: the principle as an instruction to the assistant")
        return self

    def applies_to(self, category: str) -> bool:
        return not self.applies or category in self.applies

    def keeps_rule(self, text: str) -> bool:
        """Whether the text keeps the principle's rule; True where it has none."""
        return self.rule is None or self.rule.holds(text)

    @property
    def requests(self) -> tuple[str, str] | None:
        """What asks for a critique and for a revision; None for a principle that is only for comparing."""
        if self.critique and self.revision:
            return self.critique, self.revision
        if not self.text:
            return None
        words = in_language(WORDS, self.language)
        return words["critique"].replace(PLACE, self.text), words["revision"].replace(PLACE, self.text)

    @property
    def question(self) -> str | None:
        """What a choosing judge is asked; None for a principle that is only for revising."""
        if self.compare or not self.text:
            return self.compare
        return in_language(WORDS, self.language)["compare"].replace(PLACE, self.text)


PLACE = "{principle}"
"""Replaced as it stands, and never by `format`: a principle's text may hold braces of its own."""
WORDS: dict[str, dict[str, str]] = {
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
"""What is asked about a principle that says only its `text`."""


def in_language(table: Mapping[str, T], language: str | None) -> T:
    """The entry of a language (`ja` and `ja-JP` are one), or the English one where the table lacks it."""
    return table.get((language or "en").partition("-")[0].lower(), table["en"])
