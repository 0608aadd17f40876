"""Critique and revision (Bai et al. 2022, section 3.1): a model criticises and revises its own answer.

Each round draws a principle and shows only the latest completion, without earlier critiques. A revision that a filter
catches does not replace the completion, so that one bad round does not spoil the next.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from align.constitution.constitution import Constitution
from align.constitution.documents import Passage
from align.constitution.principles import Example, Principle, draw_principle
from align.engines.complete_all import complete_all
from align.engines.engine import Completed, Engine, Request
from align.feedback.evidence import PromptContext, citations, conversation_texts, with_passages
from align.feedback.filters import OPTIONAL, RevisionCandidate, is_copy, rejecting_filter, without_preamble
from align.feedback.judge import NO_PRINCIPLE
from align.feedback.records import Critique
from align.records import Conversation, Message, Sample, digest
from align.run.reproducibility import derive_seed
from align.settings.blocks import SamplingBlock


@dataclass(frozen=True)
class RevisionChain:
    """One sample's rounds of critique and revision so far, and the completion that they led to.

    `faults` has, for each round, the name of the filter that caught its revision, or an empty text. `fault` says why no
    revision is left: the last round's filter, that no principle applies, or 'copy'. `preambles` counts removed ones.
    """

    sample: Sample
    completion: str
    rounds: tuple[Critique, ...] = ()
    faults: tuple[str, ...] = ()
    fault: str = ""
    preambles: int = 0

    @property
    def principle_ids(self) -> tuple[str, ...]:
        return tuple(each.principle_id for each in self.rounds)


@dataclass(frozen=True)
class _Step:
    """One chain's part in one round: the chat so far, the two requests, and the examples and passages shown."""

    chain: RevisionChain
    principle: Principle
    examples: tuple[Example, ...]
    chat: Conversation
    critique_request: str
    revision_request: str
    evidence: tuple[Passage, ...] = ()


@dataclass(frozen=True)
class CritiqueLoop:
    """Runs rounds of critique and revision over samples.

    Attributes:
        engine: writes the revisions, and the critiques unless `critic` is given.
        journal_path: finished requests are kept in `journal_path.<rank>`, from which an interrupted loop resumes.
        critique: False asks for the revision at once.
        examples: how many worked examples to show as earlier turns of the chat, the drawn principle's own nearest.
        filters: the filters that apply besides 'cut' and 'empty'.
        label: shown in progress bars after the number of the round.
        critic: another engine, which writes the critiques.
        provenance, critique_provenance: ids of the provenance entries that rows name for revisions and critiques.
    """

    constitution: Constitution
    engine: Engine
    sampling: SamplingBlock
    seed: int
    journal_path: Path | None = None
    critique: bool = True
    examples: int = 0
    filters: Collection[str] = OPTIONAL
    label: str = ""
    critic: Engine | None = None
    provenance: str = ""
    critique_provenance: str = ""

    def run(self, samples: Sequence[Sample], rounds: int) -> list[RevisionChain]:
        """A chain for each sample, in order, in every process."""
        chains = [RevisionChain(sample, sample.completion) for sample in samples]
        for number in range(1, rounds + 1):
            chains = self._run_round(chains, number, f"{number}/{rounds}{self.label}")
        return [self._finished(chain) for chain in chains]

    def _run_round(self, chains: Sequence[RevisionChain], number: int, progress: str) -> list[RevisionChain]:
        steps = {chain.sample.id: step for chain in chains if (step := self._step(chain, number))}
        critiques: dict[str, Completed] = {}
        done: dict[str, Completed] = {}
        if self.critique:
            done = self._complete_critiques(steps, number, progress)
            critiques = {key: done[_request_id(key, number, "critique")] for key in steps}
        if self.critic or not self.critique:
            asked = [
                self._revision_request(key, step, number, _stripped(critiques.get(key))) for key, step in steps.items()
            ]
            done |= self._complete(self.engine, asked, f"revision {progress}")
        return [
            self._with_round(steps[key], number, critiques.get(key), done[_request_id(key, number, "revision")])
            if (key := chain.sample.id) in steps
            else replace(chain, fault=NO_PRINCIPLE)
            for chain in chains
        ]

    def _step(self, chain: RevisionChain, number: int) -> _Step | None:
        """The chain's part in the round; None if no principle applies to the sample."""
        sample = chain.sample
        principle = draw_principle(
            revising_principles(self.constitution), self.seed, "principle", sample.id, number, category=sample.category
        )
        if principle is None or principle.requests is None:
            return None
        examples = nearest_examples(self.constitution.worked_examples, principle, self.examples)
        chat = self._chat(chain, examples, principle.requests)
        shown = self._context.passages(principle, conversation_texts(sample.prompt, chain.completion))
        return _Step(chain, principle, examples, chat, *self._with_passages(principle, shown), shown)

    @cached_property
    def _context(self) -> PromptContext:
        return PromptContext(self.constitution)

    def _with_passages(self, principle: Principle, shown: Sequence[Passage]) -> tuple[str, str]:
        """The requests for critique and revision. The passages go into whichever is made first."""
        critique, revision = principle.requests or ("", "")
        language = self._context.language_of(principle)
        if self.critique:
            return with_passages(critique, shown, language, cite=True), revision
        return critique, with_passages(revision, shown, language, cite=False)

    def _chat(self, chain: RevisionChain, examples: Sequence[Example], requests: tuple[str, str]) -> Conversation:
        """Worked examples, then the sample's whole conversation, which ends with the latest completion."""
        prompt = chain.sample.prompt
        system = tuple(message for message in prompt[:1] if message.role == "system")
        worked = tuple(turn for example in examples for turn in self._worked_turns(example, requests))
        return *system, *worked, *prompt[len(system) :], Message("assistant", chain.completion)

    def _worked_turns(self, example: Example, requests: tuple[str, str]) -> Conversation:
        if example.principle:
            requests = self.constitution.principle(example.principle).requests or requests
        critique, revision = requests
        turns = *example.conversation, Message("assistant", example.completion)
        if self.critique:
            turns = *_with_user(turns, example.critique_request or critique), Message("assistant", example.critique)
        return *_with_user(turns, example.revision_request or revision), Message("assistant", example.revision)

    def _complete_critiques(self, steps: Mapping[str, _Step], number: int, progress: str) -> dict[str, Completed]:
        """Critiques by request id, and their revisions too unless another engine is the critic."""
        asked = {
            key: self._request(key, _with_user(step.chat, step.critique_request), number, "critique")
            for key, step in steps.items()
        }
        if self.critic:
            return self._complete(self.critic, list(asked.values()), f"critique {progress}")

        def revising(key: str) -> Callable[[str], Request]:
            return lambda text: self._revision_request(key, steps[key], number, text.strip())

        followed = [replace(request, follow_up=revising(key)) for key, request in asked.items()]
        return self._complete(self.engine, followed, f"critique and revision {progress}")

    def _revision_request(self, key: str, step: _Step, number: int, critique: str | None) -> Request:
        turns = step.chat
        if critique is not None:
            turns = *_with_user(turns, step.critique_request), Message("assistant", critique)
        return self._request(key, _with_user(turns, step.revision_request), number, "revision")

    def _request(self, key: str, messages: Conversation, number: int, part: str) -> Request:
        return Request(
            id=_request_id(key, number, part),
            messages=messages,
            seed=derive_seed(self.seed, part, key, number),
            max_new_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
        )

    def _complete(self, engine: Engine, requests: Sequence[Request], description: str) -> dict[str, Completed]:
        return complete_all(engine, requests, self.sampling.batch_size, self.journal_path, description)

    def _with_round(self, step: _Step, number: int, written: Completed | None, revision: Completed) -> RevisionChain:
        chain = step.chain
        critique = _stripped(written) or ""
        text = without_preamble(revision.text)
        shown = tuple(text for example in step.examples for text in (example.completion, example.revision))
        candidate = RevisionCandidate(chain.completion, critique, text, revision.finish_reason, shown, self.critique)
        fault = rejecting_filter(candidate, self.filters)
        made = Critique(
            id=digest([chain.sample.id, "critique", number]),
            prompt_id=chain.sample.prompt_id,
            round=number,
            principle_id=step.principle.id,
            completion=chain.completion,
            critique=critique,
            revision=revision.text,
            finish_reason=revision.finish_reason,
            seed=derive_seed(self.seed, "revision", chain.sample.id, number),
            evidence=tuple(passage.id for passage in step.evidence),
            cited=citations(critique),
            provenance=self.provenance,
            critique_seed=derive_seed(self.seed, "critique", chain.sample.id, number) if self.critique else None,
            critique_provenance=self.critique_provenance if self.critique else "",
            critique_finish_reason=written.finish_reason if written else None,
        )
        was_revised = any(not earlier for earlier in chain.faults)
        return RevisionChain(
            sample=chain.sample,
            completion=chain.completion if fault else text,
            rounds=(*chain.rounds, made),
            faults=(*chain.faults, fault),
            fault="" if was_revised else fault,
            preambles=chain.preambles + (text != revision.text.strip()),
        )

    def _finished(self, chain: RevisionChain) -> RevisionChain:
        """The chain; a fault if all its rounds together led back to the original."""
        whole = RevisionCandidate(chain.sample.completion, "", chain.completion, "stop")
        if not chain.fault and "copy" in self.filters and is_copy(whole):
            return replace(chain, fault="copy")
        return chain


def revising_principles(constitution: Constitution) -> tuple[Principle, ...]:
    """The principles that have the requests to critique and revise a completion."""
    return tuple(principle for principle in constitution.principles if principle.requests)


def nearest_examples(examples: Sequence[Example], principle: Principle, count: int) -> tuple[Example, ...]:
    """At most `count` worked examples. The principle's own are taken first and shown last, next to the question."""
    by_relevance = sorted(examples, key=lambda example: example.principle != principle.id)
    return tuple(by_relevance[:count][::-1])


def _request_id(key: str, number: int, part: str) -> str:
    return f"{key}/{number}/{part}"


def _stripped(critique: Completed | None) -> str | None:
    return critique.text.strip() if critique else None


def _with_user(turns: Conversation, text: str) -> Conversation:
    return *turns, Message("user", text)
