"""The policies' completions, and what models measure on them: log-probabilities and a reward model's scores.

Both work in fixed chunks and write each row to disk as soon as it is finished. A kill costs one chunk at most; neither
kills nor the number of processes change a result. Models are loaded only if something is left to measure.
"""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.engines.engine import Completed, Engine, Request
from align.engines.provenance import Provenance
from align.errors import InputError, NotFinite
from align.evaluation.report import EvaluatedSample
from align.run import processes
from align.run.artefacts import Journal
from align.run.progress import RowBar
from align.settings.blocks import EngineBlock, ModelBlock

if TYPE_CHECKING:
    import torch

Measure = Callable[[Sequence[EvaluatedSample]], list[Any]]


def policy_completions(
    folder: str | None,
    block: ModelBlock,
    requests: Sequence[Request],
    batch_size: int,
    journal_path: Path,
    description: str,
    entry_of: Callable[[Engine], Provenance],
) -> tuple[dict[str, Completed], Provenance]:
    """A policy's completions of all requests, by id, in every process, and their provenance. The policy is then freed.

    Args:
        folder: the policy's folder; None is the recipe's base model.
        entry_of: makes the provenance entry, before anything is generated.
        journal_path: completions are kept in `journal_path.<rank>`; those found there are not generated again.
    """
    from align.engines.complete_all import complete_all
    from align.engines.open import open_engine

    engine = open_engine(EngineBlock(), block, path=folder)
    entry = entry_of(engine)
    done = complete_all(engine, requests, batch_size, journal_path, description)
    del engine
    release_memory()
    return done, entry


def measure_all(
    samples: Sequence[EvaluatedSample],
    load: Callable[[], Measure],
    batch_size: int,
    journal_path: Path,
    description: str,
) -> dict[str, Any]:
    """The measured values of all samples, by id, in every process. The model is then freed.

    Args:
        load: loads the model and returns a function from samples to one JSON-serialisable value each.
        journal_path: values are kept in `journal_path.<rank>`; those found there are not measured again.
    """
    ordered = sorted(samples, key=lambda sample: (-_length_in_characters(sample), sample.id))
    chunks = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    with Journal(journal_path, processes.rank(), _check_journal_row) as journal:
        own = processes.shard(chunks)
        todo = [chunk for chunk in own if any(sample.id not in journal for sample in chunk)]
        if todo:
            measure = load()
            total, left = (sum(len(chunk) for chunk in some) for some in (own, todo))
            with RowBar(total, total - left, description) as bar:
                _measure_chunks(todo, measure, journal, bar)
            del measure
    release_memory()
    processes.barrier()
    with Journal(journal_path, processes.rank(), _check_journal_row) as journal:
        return {sample.id: journal.rows[sample.id]["value"] for sample in samples}


def policy_logprobs(path: str, block: ModelBlock, temperature: float, revision: str | None = None) -> Measure:
    """Measures the log-probabilities of a completion's tokens under a policy, in nats, as a list for each sample.

    The tokens are those that were sampled, with the stop token that was drawn.

    Args:
        temperature: divides the logits; 0 (greedy) counts as 1.
    """
    from align.models.loading import compute_dtype, default_device, load_causal_lm, load_tokenizer
    from align.models.logprobs import completion_logprobs

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": block.trust_remote_code}
    tokenizer = load_tokenizer(path, **options)
    device = default_device()
    model = load_causal_lm(path, compute_dtype(block.precision), **options).to(device)

    def measure(samples: Sequence[EvaluatedSample]) -> list[list[float]]:
        import torch

        rows = [sample_ids(tokenizer, sample, block.system_prompt) for sample in samples]
        input_ids, attention_mask, length = pad_batch(rows, tokenizer.pad_token_id, device)
        with torch.no_grad():
            found = completion_logprobs(model, input_ids, attention_mask, length, temperature or 1.0)
        return [row[: len(completion)] for row, (_, completion) in zip(found.logprobs.tolist(), rows, strict=True)]

    return measure


def reward_scores(path: Path, block: ModelBlock, batch_size: int) -> Measure:
    """Measures a reward model's score of each conversation as the policy read and wrote it; None without an answer."""
    from align.models.loading import compute_dtype, default_device, load_tokenizer
    from align.rl.loading import classifier_scores, load_classifier
    from align.rl.rewards import Response, RewardModel

    device, dtype = default_device(), compute_dtype(block.precision)
    tokenizer = load_tokenizer(str(path), trust_remote_code=block.trust_remote_code)
    classifier = load_classifier(path, dtype, trust_remote_code=block.trust_remote_code).to(device)
    reward = RewardModel(classifier_scores(classifier, dtype, tokenizer.pad_token_id), batch_size)

    def measure(samples: Sequence[EvaluatedSample]) -> list[float | None]:
        rows = [sample_ids(tokenizer, sample, block.system_prompt) for sample in samples]
        responses = [
            Response(sample.prompt, sample.completion, prompt_ids=opening, token_ids=written)
            for sample, (opening, written) in zip(samples, rows, strict=True)
        ]
        scores = reward(responses).tolist()
        return [score if sample.answered else None for sample, score in zip(samples, scores, strict=True)]

    return measure


def kl_sums(logprobs: Sequence[float], ref_logprobs: Sequence[float]) -> tuple[float, float]:
    """(k1, k3) estimates of KL(policy || reference), in nats, summed over the tokens of a completion by the policy."""
    import torch

    from align.rl.advantages import kl_terms

    both = (torch.tensor([row], dtype=torch.float64) for row in (logprobs, ref_logprobs))
    terms = kl_terms(*both)
    return float(terms["k1"].sum()), float(terms["k3"].sum())


def sample_ids(tokenizer: Any, sample: EvaluatedSample, system_prompt: str | None) -> tuple[list[int], list[int]]:
    """(prompt ids, completion ids) of a sample, as the policy read and wrote them.

    Raises:
        InputError: the tokens were not kept.
    """
    from align.data.chat import prompt_ids

    if len(sample.token_ids) != sample.tokens:
        raise InputError(
            f"evaluate: the tokens of {sample.policy}'s answer to prompt '{sample.prompt_id}' were not kept, because "
            "another version of align wrote it; remove the stage's unfinished folder and run it again"
        )
    return prompt_ids(tokenizer, sample.prompt, system_prompt), list(sample.token_ids)


def pad_batch(
    rows: Sequence[tuple[list[int], list[int]]], pad_id: int, device: "torch.device"
) -> tuple["torch.Tensor", "torch.Tensor", int]:
    """(ids, mask, T): ids and mask are (B, L), prompts padded on the left, completions on the right to T tokens."""
    import torch

    prompt_length = max(len(prompt) for prompt, _ in rows)
    completion_length = max(1, *(len(completion) for _, completion in rows))
    input_ids = torch.full((len(rows), prompt_length + completion_length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, (prompt, completion) in enumerate(rows):
        columns = slice(prompt_length - len(prompt), prompt_length + len(completion))
        input_ids[row, columns] = torch.tensor(prompt + completion)
        attention_mask[row, columns] = 1
    return input_ids.to(device), attention_mask.to(device), completion_length


def release_memory() -> None:
    """Free the memory of models that are no longer referenced."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure_chunks(
    chunks: Sequence[Sequence[EvaluatedSample]], measure: Measure, journal: Journal, bar: RowBar
) -> None:
    for chunk in chunks:
        bar.begin(len(chunk))
        for sample, value in zip(chunk, measure(chunk), strict=True):
            _check_finite(value, sample)
            journal.append({"id": sample.id, "value": value})
            bar.row()


def _check_finite(value: Any, sample: EvaluatedSample) -> None:
    """Check a measured number, or list of numbers, before it is kept.

    Raises:
        NotFinite: a number is NaN or infinite; the message names the policy and the prompt.
    """
    if not _is_finite(value):
        raise NotFinite(
            f"evaluate: a value measured on {sample.policy}'s answer to prompt '{sample.prompt_id}' is not finite (NaN "
            "or infinity); the model that measures it is broken: train it again, or set `model.precision: fp32`"
        )


def _check_journal_row(row: Mapping[str, Any]) -> None:
    if not _is_finite(row["value"]):
        raise ValueError("a number in it is not finite")


def _is_finite(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(math.isfinite(number) for number in numbers if isinstance(number, float))


def _length_in_characters(sample: EvaluatedSample) -> int:
    return len(sample.completion) + sum(len(message.content) for message in sample.prompt)
