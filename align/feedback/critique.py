"""Critique and revision (Bai et al. 2022, section 3.1): a model criticises its own answer by a principle, and mends it.

Each round draws one principle afresh and shows the latest completion alone; earlier critiques are dropped. A revision
that a filter catches does not take the completion's place, so that one bad round does not spoil the next.
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
from align.feedback.evidence import Showing, citations, conversation_texts, with_passages
from align.feedback.filters import OPTIONAL, Revised, caught_by, is_copy, without_preamble
from align.feedback.judge import NO_PRINCIPLE
from align.feedback.records import Critique
from align.records import Conversation, Message, Sample, digest
from align.run.reproducibility import derive_seed
from align.settings.blocks import SamplingBlock


@dataclass(frozen=True)
class Chain:
    """What became of one sample: the rounds so far, the completion they led to, and what the last filter caught.

    `fault` is empty as soon as a revision has taken the completion's place; `faults` has every round's own.
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
    """One round of one chain: the worked examples, the chat so far, the passages shown, and what is asked next."""

    chain: Chain
    principle: Principle
    examples: tuple[Example, ...]
    chat: Conversation
    critique_request: str
    revision_request: str
    evidence: tuple[Passage, ...] = ()


@dataclass(frozen=True)
class Loop:
    """The loop over one engine. Finished steps are kept in `journal_path.<rank>`.

    `examples` worked examples are shown as earlier turns of the chat, those of the drawn principle nearest; `critique`
    False asks for the revision at once; `filters` are those that apply besides 'cut' and 'empty'; `label` is said in
    progress bars after the round; `critic` writes the critiques where that is another engine; `provenance` and
    `critique_provenance` are what rows name for revisions and critiques.
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

    def run(self, samples: Sequence[Sample], rounds: int) -> list[Chain]:
        """A chain for each sample, in order; every process gets all of them."""
        chains = [Chain(sample, sample.completion) for sample in samples]
        for number in range(1, rounds + 1):
            chains = self._round(chains, number, f"{number}/{rounds}{self.label}")
        return [self._ended(chain) for chain in chains]

    def _round(self, chains: Sequence[Chain], number: int, progress: str) -> list[Chain]:
        steps = {chain.sample.id: step for chain in chains if (step := self._step(chain, number))}
        critiques: dict[str, Completed] = {}
        done: dict[str, Completed] = {}
        if self.critique:
            done = self._criticised(steps, number, progress)
            critiques = {key: done[_step_id(key, number, "critique")] for key in steps}
        if self.critic or not self.critique:
            asked = [
                self._revision_request(key, step, number, _text(critiques.get(key))) for key, step in steps.items()
            ]
            done |= self._complete(self.engine, asked, f"revision {progress}")
        return [
            self._revised(steps[key], number, critiques.get(key), done[_step_id(key, number, "revision")])
            if (key := chain.sample.id) in steps
            else replace(chain, fault=NO_PRINCIPLE)
            for chain in chains
        ]

    def _step(self, chain: Chain, number: int) -> _Step | None:
        """What the round asks, or None where no principle applies to the sample."""
        sample = chain.sample
        principle = draw_principle(
            revising_principles(self.constitution), self.seed, "principle", sample.id, number, category=sample.category
        )
        if principle is None or principle.requests is None:
            return None
        examples = nearest_examples(self.constitution.worked_examples, principle, self.examples)
        chat = self._chat(chain, examples, principle.requests)
        texts = conversation_texts(sample.prompt, chain.completion)
        shown = self._showing.passages(principle, texts)
        return _Step(chain, principle, examples, chat, *self._with_passages(principle, shown), shown)

    @cached_property
    def _showing(self) -> Showing:
        return Showing(self.constitution)

    def _with_passages(self, principle: Principle, shown: Sequence[Passage]) -> tuple[str, str]:
        """The requests for critique and revision, of which the first that is made has the passages."""
        critique, revision = principle.requests or ("", "")
        language = principle.language or self.constitution.language
        if self.critique:
            return with_passages(critique, shown, language, cite=True), revision
        return critique, with_passages(revision, shown, language, cite=False)

    def _chat(self, chain: Chain, examples: Sequence[Example], requests: tuple[str, str]) -> Conversation:
        """Worked examples, then the sample's whole conversation with the latest completion as its last turn."""
        prompt = chain.sample.prompt
        system = tuple(message for message in prompt[:1] if message.role == "system")
        worked = tuple(turn for example in examples for turn in self._worked(example, requests))
        return *system, *worked, *prompt[len(system) :], Message("assistant", chain.completion)

    def _worked(self, example: Example, requests: tuple[str, str]) -> Conversation:
        if example.principle:
            requests = self.constitution.principle(example.principle).requests or requests
        turns = *example.conversation, Message("assistant", example.completion)
        if self.critique:
            turns = *_ask(turns, example.critique_request or requests[0]), Message("assistant", example.critique)
        return *_ask(turns, example.revision_request or requests[1]), Message("assistant", example.revision)

    def _criticised(self, steps: Mapping[str, _Step], number: int, progress: str) -> dict[str, Completed]:
        """Critiques by request id; with each its revision, unless another engine is the critic."""
        asked = {
            key: self._request(key, _ask(step.chat, step.critique_request), number, "critique")
            for key, step in steps.items()
        }
        if self.critic:
            return self._complete(self.critic, list(asked.values()), f"critique {progress}")

        def revising(key: str) -> Callable[[str], Request]:
            return lambda text: self._revision_request(key, steps[key], number, text.strip())

        followed = [replace(request, follow_up=revising(key)) for key, request in asked.items()]
        return self._complete(self.engine, followed, f"critique and revision {progress}")

    def _revision_request(self, key: str, step: _Step, number: int, critique: str | None) -> Request:
        return self._request(key, _revision_chat(step, critique), number, "revision")

    def _request(self, key: str, messages: Conversation, number: int, step: str) -> Request:
        return Request(
            id=_step_id(key, number, step),
            messages=messages,
            seed=derive_seed(self.seed, step, key, number),
            max_new_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
        )

    def _complete(self, engine: Engine, requests: Sequence[Request], description: str) -> dict[str, Completed]:
        return complete_all(engine, requests, self.sampling.batch_size, self.journal_path, description)

    def _revised(self, step: _Step, number: int, written: Completed | None, revision: Completed) -> Chain:
        chain = step.chain
        critique = _text(written) or ""
        text = without_preamble(revision.text)
        shown = tuple(text for example in step.examples for text in (example.completion, example.revision))
        revised = Revised(chain.completion, critique, text, revision.finish_reason, shown, self.critique)
        fault = caught_by(revised, self.filters)
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
        return Chain(
            sample=chain.sample,
            completion=chain.completion if fault else text,
            rounds=(*chain.rounds, made),
            faults=(*chain.faults, fault),
            fault="" if was_revised else fault,
            preambles=chain.preambles + (text != revision.text.strip()),
        )

    def _ended(self, chain: Chain) -> Chain:
        """The chain, faulty where all its rounds together led back to the original."""
        whole = Revised(chain.sample.completion, "", chain.completion, "stop")
        if not chain.fault and "copy" in self.filters and is_copy(whole):
            return replace(chain, fault="copy")
        return chain


def revising_principles(constitution: Constitution) -> tuple[Principle, ...]:
    """The principles that a completion can be revised by."""
    return tuple(principle for principle in constitution.principles if principle.requests)


def nearest_examples(examples: Sequence[Example], principle: Principle, count: int) -> tuple[Example, ...]:
    """At most `count` worked examples: the principle's own first among those taken, and last among those shown."""
    by_relevance = sorted(examples, key=lambda example: example.principle != principle.id)
    return tuple(by_relevance[:count][::-1])


def _step_id(key: str, number: int, step: str) -> str:
    return f"{key}/{number}/{step}"


def _text(critique: Completed | None) -> str | None:
    return critique.text.strip() if critique else None


def _ask(turns: Conversation, request: str) -> Conversation:
    return *turns, Message("user", request)


def _revision_chat(step: _Step, critique: str | None) -> Conversation:
    turns = step.chat
    if critique is not None:
        turns = *_ask(turns, step.critique_request), Message("assistant", critique)
    return _ask(turns, step.revision_request)
