"""The keys of a constitution's YAML file."""

from collections.abc import Mapping

from pydantic import ConfigDict, Field

from align.constitution.principles import Example, Id, Language, Principle, Text, Texts, WorkedComparison
from align.settings.blocks import AboveZero, Block, Positive


class ConstitutionContent(Block):
    """What a constitution holds both as written and after `extends`."""

    title: Text = Field(description="the constitution's name")
    version: Text = Field("1", description="version of the file, in quotes")
    licence: str = Field("", description="licence of the texts")
    source: str = Field("", description="origin of the texts")
    language: Language = Field("en", description="language of the texts, such as en or ja")
    preamble: str | None = Field(None, description="the aim of the constitution; a note for readers")
    tiers: tuple[Text, ...] = Field((), description="names of the tiers; an earlier tier decides before a later one")
    passages: Positive = Field(3, description="the largest number of passages of `sources` that are shown")
    principles: tuple[Principle, ...] = Field((), description="what completions are revised and judged by")
    examples: tuple[Example, ...] = Field((), description="worked examples of critique and revision")
    comparisons: tuple[WorkedComparison, ...] = Field((), description="worked examples of a choice")


class ConstitutionFile(ConstitutionContent):
    """A constitution as written, before `extends`."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["principles"], "properties": {"principles": {"minItems": 1}}},
                {"required": ["extends"]},
            ]
        }
    )

    extends: Texts = Field((), description="parent files, relative to this file's folder")
    include: tuple[Text, ...] = Field((), description="inherit only principles with one of these tags; empty is all")
    exclude: tuple[Text, ...] = Field((), description="inherit no principle with one of these tags")
    drop: tuple[Id, ...] = Field((), description="ids of principles that are not inherited")
    weights: Mapping[Id, AboveZero] = Field(
        {},
        description="new weights for inherited principles, by id",
        json_schema_extra={"additionalProperties": False},
    )
    sources: Texts | None = Field(None, description="folders of documents, relative to this file's folder")
