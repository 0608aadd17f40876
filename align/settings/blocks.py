"""The blocks of a recipe that several stages use, and the types of their values. Imports no tensor library."""

import datetime
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, got true/false")
    return value


def _address(value: str) -> str:
    # Without a scheme the client would retry for a minute, and then report that the server cannot be reached.
    if not value.startswith(("http://", "https://")):
        raise ValueError(f"must begin with http:// or https://, got {value!r}; write http://{value}")
    if "@" in value.split("/")[2]:
        # The address is shown in recipes, manifests and errors.
        raise ValueError("has a name or password before its @; put the key in the variable that api_key_env names")
    return value


Integer = Annotated[int, BeforeValidator(_not_bool)]
Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
# The limit comes before the validator; the other way round pydantic leaves it out of a JSON schema.
Positive = Annotated[int, Field(gt=0), BeforeValidator(_not_bool)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_not_bool)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
HUB_REVISION = "branch, tag or commit, if the model is a hub id"
HUMAN_SHARE = "share of human pairs in the mix, reached by leaving out pairs of either side; null uses all pairs"


class Block(BaseModel):
    """Base class of a recipe's blocks: unknown keys are errors, and a block is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _inner_defaults(cls, given: Any) -> Any:
        """Take the keys that an inner block leaves out from this block's default for it.

        The default learning rate of dpo's optimizer is lower than that of `OptimizerBlock`, for example, and must stay
        so if a recipe sets only the optimizer's batch size.
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
    """Low-rank adapters (Hu et al. 2021). They are trained in fp32 whatever the precision of the base weights."""

    r: Positive = Field(16, description="rank of the adapters")
    alpha: Positive = Field(32, description="scale: the adapter's output is multiplied by alpha / r")
    target_modules: str | tuple[str, ...] = Field("all-linear", description="names of the layers that get an adapter")


def _checked_day(text: str) -> str:
    return datetime.date.fromisoformat(text).isoformat()


def _as_text(value: Any) -> Any:
    """YAML reads an unquoted date as one."""
    return value.isoformat() if type(value) is datetime.date else value


Day = Annotated[str, BeforeValidator(_as_text), AfterValidator(_checked_day)]


class ModelBlock(Block):
    """The base model: a hub id, a local folder, a .gguf file, or `wheel:NAME` for the model in a Python package."""

    path: str = Field(description="hub id, local folder, .gguf file or `wheel:NAME`")
    revision: str | None = Field(None, description=HUB_REVISION)
    trust_remote_code: bool = Field(False, description="run the code that comes with the model")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="compute precision; auto is bf16 where the hardware supports it, otherwise fp32"
    )
    lora: LoraBlock | None = Field(default_factory=LoraBlock, description="low-rank adapters; null trains every weight")
    system_prompt: str | None = Field(None, description="system message for prompts that have none")
    date: Day | None = Field(
        None, description="YYYY-MM-DD, for chat templates that print today's date; null: the day on which the run began"
    )


class OptimizerBlock(Block):
    """AdamW and its learning-rate schedule. `batch_size` is global: examples per optimizer step over all processes."""

    learning_rate: Annotated[Number, Field(gt=0)] = Field(1e-4, description="peak learning rate")
    batch_size: Positive = Field(16, description="examples per optimizer step, over all processes")
    micro_batch_size: Positive = Field(8, description="examples per forward and backward pass, in each process")
    warmup_ratio: Fraction = Field(0.0, description="share of the steps over which the learning rate rises from 0")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="learning rate after the warm-up")
    weight_decay: NonNegative = Field(0.0, description="weight decay of AdamW")
    max_grad_norm: Annotated[Number, Field(gt=0)] = Field(1.0, description="gradients are clipped to this norm")
    epsilon: AboveZero | None = Field(
        None,
        description="epsilon of Adam; null: 1e-8, or 1e-5 in ppo without LoRA",
        exclude_if=lambda value: value is None,  # so that results from before this key stay up to date
    )


class SamplingBlock(Block):
    """How completions are sampled."""

    max_new_tokens: Positive = Field(256, description="limit on a completion's tokens; rows record if it was reached")
    temperature: NonNegative = Field(1.0, description="sampling temperature; 0 is greedy decoding")
    top_p: Annotated[Number, Field(gt=0, le=1)] = Field(
        1.0, description="nucleus sampling: sample from the most likely tokens with this total probability"
    )
    batch_size: Positive = Field(32, description="completions generated together, in each process")


SERVER_KEYS = ("base_url", "api_key_env", "votes", "tokenizer", "extra")
"""Keys of an engine that only a server reads."""


def _is_changed(block: Block, name: str) -> bool:
    return bool(getattr(block, name) != type(block).model_fields[name].default)


class EngineBlock(Block):
    """What generates and scores texts: this machine (`local`), or an OpenAI-compatible server (`openai`)."""

    kind: Literal["local", "openai"] = Field("local", description="this machine, or an OpenAI-compatible server")
    model: str | None = Field(None, description="model instead of the recipe's; for a server, the name that it serves")
    base_url: Annotated[str, AfterValidator(_address)] | None = Field(
        None, description="address of the server; null is OpenAI's own"
    )
    votes: Positive = Field(8, description="answers sampled per question if a server returns no log-probabilities")
    tokenizer: str | None = Field(
        None, description="tokenizer of the served model, needed to score texts by echoed completions; null: no scoring"
    )
    extra: dict[str, Any] = Field({}, description="further keys of every request, such as `{top_k: 0, min_p: 0}`")

    # The keys below decide only whether a server answers, not what. They are therefore excluded from digests: a stage
    # that a slow server has ended resumes with a longer timeout.
    api_key_env: str = Field(
        "OPENAI_API_KEY", exclude=True, description="environment variable that holds the API key; never the key itself"
    )
    concurrency: Positive = Field(8, exclude=True, description="concurrent requests to a server, over all processes")
    timeout_seconds: Annotated[Number, Field(gt=0)] = Field(
        120.0, exclude=True, description="time limit for a server's complete answer to a request"
    )
    max_retries: Annotated[Integer, Field(ge=0)] = Field(
        6, exclude=True, description="retries of a request that a server did not answer"
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "EngineBlock":
        if self.kind == "openai" and not self.model:
            raise ValueError("kind openai: name the `model` that the server serves")
        if self.kind == "local" and (unread := [name for name in SERVER_KEYS if _is_changed(self, name)]):
            raise ValueError(f"kind local does not read {', '.join(unread)}; remove it, or set `kind: openai`")
        return self


class JudgeBlock(Block):
    """How one completion is preferred to another.

    `choice` asks a model for a letter, normalises the probabilities of the two letters and averages both orders.
    `contrast` takes log p(completion | principle) minus log p(completion | its opposite), per token. `rule` checks the
    principles' rules and asks no model.
    """

    kind: Literal["choice", "contrast", "rule"] = Field("choice", description="kind of judge; see docs/judging.md")
    engine: EngineBlock = Field(default_factory=EngineBlock)
    scale: Annotated[Number, Field(gt=0)] = Field(
        4.0, description="rule and contrast: slope of the map from score difference to probability"
    )
    clamp: Annotated[Number, Field(ge=0, lt=0.5)] = Field(0.0, description="clamps probabilities to [clamp, 1 - clamp]")
    min_margin: Annotated[Number, Field(ge=0, lt=0.5)] = Field(
        0.02, description="a probability closer to one half than this is a tie"
    )
    hard_margin: Annotated[Number, Field(ge=0, lt=0.5)] = Field(
        0.25,
        description="a hard principle decides by the judge's opinion only if its probability is further from one half "
        "than this",
    )
    min_option_mass: Fraction = Field(
        0.01, description="choice: the judge abstains if the letters' (or marks') total probability is below this"
    )
    chain_of_thought: bool = Field(False, description="choice: the judge reasons before it chooses")
    chain_of_thought_range: tuple[Fraction, Fraction] = Field(
        (0.4, 0.6), description="range that probabilities after a chain of thought are clamped to (Bai et al. 2022)"
    )
    reasoning: SamplingBlock = Field(
        default_factory=lambda: SamplingBlock(max_new_tokens=256), description="how the chain of thought is sampled"
    )
    batch_size: Positive = Field(32, description="requests scored together")
    examples: Annotated[Integer, Field(ge=0)] = Field(
        0, description="choice: worked examples shown before the question; they made the judges of Lee et al. worse"
    )
    allow_chance: bool = Field(False, description="label even if the judge is not shown to be better than chance")

    @model_validator(mode="after")
    def _consistent(self) -> "JudgeBlock":
        low, high = self.chain_of_thought_range
        if not low < 0.5 or abs(low + high - 1) > 1e-9:
            raise ValueError(
                "chain_of_thought_range must be symmetric about one half, such as [0.4, 0.6]: swapping the completions "
                "swaps the probabilities"
            )
        if self.kind != "choice" and self.examples:
            raise ValueError(f"kind {self.kind} does not read examples; remove them, or set `kind: choice`")
        if self.kind != "choice" and self.chain_of_thought:
            raise ValueError(f"kind {self.kind} does not read chain_of_thought; remove it, or set `kind: choice`")
        if self.chain_of_thought and 0.5 - low <= self.min_margin:
            raise ValueError("chain_of_thought_range makes every verdict a tie; widen it, or lower min_margin")
        return self


class TrackingBlock(Block):
    """Where figures are logged besides `metrics.jsonl`. A change here makes no stage stale."""

    wandb: bool = Field(False, description="log to Weights & Biases too, offline if there is no login or network")
    project: str = Field("align", description="project in wandb")
    entity: str | None = Field(None, description="user or team in wandb; null is wandb's default")


class RewardSourceBlock(Block):
    """One source of scores: exactly one of `stage`, `judge`, `model` and `function`."""

    stage: Literal["reward"] | None = Field(None, description="the recipe's reward stage")
    judge: Literal["direct"] | None = Field(
        None,
        description="the recipe's judge scores each completion by the constitution (direct RLAIF, Lee et al. 2023)",
    )
    principle: Literal["all", "draw"] = Field(
        "all", description="judge: average over all principles that apply, or draw one for each completion"
    )
    model: str | None = Field(None, description="a sequence classifier: hub id or local folder")
    revision: str | None = Field(None, description=HUB_REVISION)
    label: str | None = Field(None, description="model: the output to use, by name or number, if there are several")
    reads: Literal["conversation", "completion"] | None = Field(
        None, description="model: the text that it is given; null is the conversation"
    )
    function: str | None = Field(
        None,
        description="`module:function`, called with (prompts, completions), returns one number per completion; "
        "the current folder is searched first",
    )
    name: str | None = Field(None, description="name in figures; null is that of the stage, folder or function")
    weight: Annotated[Number, Field(gt=0)] = Field(1.0, description="weight in the mean of the sources")
    gold: bool = Field(False, description="gold reward: scored and logged with the others, never trained against")

    @property
    def key(self) -> str:
        """The source's name in figures."""
        folder = (self.model or "").rstrip("/").removesuffix("/model").rpartition("/")[2]
        return self.name or self.stage or (self.judge and "judge") or folder or (self.function or "").rpartition(":")[2]

    @model_validator(mode="after")
    def _names_one_source(self) -> "RewardSourceBlock":
        named = [key for key in ("stage", "judge", "model", "function") if getattr(self, key) is not None]
        if len(named) != 1:
            raise ValueError(f"set exactly one of stage, judge, model and function; set: {', '.join(named) or 'none'}")
        if self.judge is None and self.principle != "all":
            raise ValueError("principle: only a `judge` reads it; remove it")
        if self.model is None and (of_model := {"revision", "label", "reads"} & self.model_fields_set):
            raise ValueError(f"{', '.join(sorted(of_model))}: only a `model` reads this; remove it")
        module, colon, function = (self.function or "module:function").partition(":")
        if not (colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise ValueError(f"function must be module:function, such as my_rewards:brevity; got '{self.function}'")
        return self
