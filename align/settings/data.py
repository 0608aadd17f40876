"""Blocks that name data: files, folders and hub datasets of prompts, demonstrations and preference pairs."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.settings.blocks import AboveZero, Block, Fraction, Positive

Column = Literal[
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "messages",
    "system",
    "category",
    "split",
    "label",
    "score",
    "score_chosen",
    "score_rejected",
    "margin",
    "probability",
    "response_0",
    "response_1",
    "better_response_id",
]
"""What a column can hold."""
Paths = Annotated[tuple[str, ...], Field(min_length=1)]


class DataSource(Block):
    """Rows of a file, of several files, of a folder that `save_to_disk` wrote, or of a hub dataset."""

    path: str | Paths = Field(
        description="a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt, also .gz and .zst), a pattern such "
        "as `data/*.jsonl`, a list of these, a folder, an `hf://` path, or a hub id"
    )
    limit: Positive | None = Field(None, description="maximum number of rows, selected by a hash; null takes all")
    hub_split: str = Field("train", description="split to read of a hub dataset, or of a folder with several")
    hub_folder: str | None = Field(None, description="folder to read of a hub dataset, such as helpful-base; null: all")
    hub_config: str | None = Field(None, description="configuration to read of a hub dataset that has several")
    hub_revision: str | None = Field(None, description="revision of a hub dataset: branch, tag or commit")
    streaming: bool = Field(
        False, description="read a hub dataset over the network each time, without a copy on this machine"
    )
    columns: dict[Column, str] = Field(
        {},
        description="for a layout that is not known: which column holds what, such as `{prompt: ask, chosen: good}`; "
        "a dot reaches inside, as in `answers.0.text`. No other column is read then",
    )
    max_unusable: Fraction = Field(
        0.02, description="share of the rows that may be unusable; they are left out, counted and kept aside"
    )

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def title(self) -> str:
        """What errors call the source."""
        return ", ".join(self.paths)


class PromptSource(DataSource):
    """Prompts from files or a hub dataset."""

    column: str | None = Field(None, description="column that holds the prompt; null finds it in the known layouts")
    category: str | None = Field(None, description="category of rows that name none")

    @model_validator(mode="after")
    def _names_the_prompt_once(self) -> "PromptSource":
        if self.column and self.columns:
            raise ValueError("column: `columns` says which column holds what; name the prompt there, as `prompt`")
        return self


class SplitBlock(Block):
    """Shares of the prompts. A prompt's split follows from a hash of its text, so it is the same in every run."""

    sft: Fraction = Field(0.3, description="share of prompts whose answers are revised, and sft trains on them")
    preference: Fraction = Field(0.3, description="share of prompts whose answers the compare stage labels in pairs")
    rl: Fraction = Field(0.3, description="share of prompts that ppo trains on")
    eval: Fraction = Field(0.1, description="share of prompts held out for evaluate")


class PromptsBlock(Block):
    """Where prompts come from, and how they are split. A row that names its `split` keeps it."""

    sources: Annotated[tuple[PromptSource, ...], Field(min_length=1)] = Field(description="files or hub datasets")
    split: SplitBlock = Field(default_factory=SplitBlock)
    max_tokens: Positive | None = Field(
        None, description="longer prompts are left out and counted; null goes by the model's positions"
    )
    cut: Literal["start", "end"] | None = Field(
        None, description="cut prompts that are too long at this side, in the place of leaving them out"
    )


class PairSource(DataSource):
    """Preference pairs or demonstrations from files or a hub dataset."""

    name: str | None = Field(None, description="name of these rows in counts and tables, instead of `human`")
    margin_scale: AboveZero | None = Field(
        None,
        description="soft labels from scores or margins: p(chosen is better) = 1 / (1 + exp(-margin_scale × margin)); "
        "null takes labels as certain, and leaves out pairs whose scores are equal or say the opposite",
    )
    ranked_pairs: Literal["best_worst", "all"] = Field(
        "best_worst", description="of several answers with scores: the best with the worst, or each with each"
    )
