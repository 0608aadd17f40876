"""Opens the engine that an `engine:` block of a recipe describes."""

from pathlib import Path

from align.engines.engine import Engine
from align.settings.blocks import EngineBlock, ModelBlock


def open_engine(block: EngineBlock, model: ModelBlock, *, path: str | None = None) -> Engine:
    """The engine of an `engine:` block.

    Args:
        model: the recipe's model. Every engine puts its system prompt before conversations that have none.
        path: a model made by the pipeline, for a local engine to run. Without it, that is the block's `model`, or else
            the recipe's.

    Raises:
        InputError: the model cannot be loaded, or a server's settings are incomplete.
    """
    if block.kind == "openai":
        from align.engines.openai_server import OpenAIEngine

        return OpenAIEngine(block, system_prompt=model.system_prompt)
    from align.engines.local import LocalEngine
    from align.models.loading import compute_dtype, default_device, load_causal_lm, load_tokenizer
    from align.models.weights import Weights, model_folder

    chosen = path or block.model or model.path
    revision = model.revision if chosen == model.path else None
    trust = model.trust_remote_code and chosen in (model.path, path)
    language_model = load_causal_lm(chosen, compute_dtype(model.precision), revision=revision, trust_remote_code=trust)
    tokenizer = load_tokenizer(chosen, revision=revision, trust_remote_code=trust)
    folder = model_folder(chosen, revision)
    return LocalEngine(
        language_model.to(default_device()),
        tokenizer,
        name=_name(chosen, 2 if path else 1),
        system_prompt=model.system_prompt,
        weights=Weights(folder) if folder else None,
    )


def _name(path: str, parts: int) -> str:
    """The name of a model in the rows: the last `parts` of a local path, so that rows do not depend on its location.

    One part for a user's model: its parent folder may be the user's name, and the two would look like a hub id. Two
    for a model made by the pipeline, whose parent folder is named after its stage.
    """
    local = Path(path).expanduser()
    return "local:" + ("/".join(local.resolve().parts[-parts:]) if local.exists() else path)
