"""A constitution after `extends`: the principles that steer a run, and the digest that identifies them."""

from functools import cached_property
from typing import Any

from pydantic import Field

from align.constitution.principles import Example, Principle, WorkedComparison
from align.constitution.schema import ConstitutionContent
from align.records import digest


class Constitution(ConstitutionContent):
    """At least one principle, with unique ids. `id` is the file's stem.

    Every principle has its language and its sources filled in. Sources are paths relative to the working directory;
    `documents` maps each of them to its digest.
    """

    id: str
    sources: tuple[str, ...] = ()
    documents: dict[str, str] = Field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the content in canonical form: without the id, values equal to the default, and folder paths.

        Comments and the order of keys do not change it; a single letter of a text does.
        """
        return digest(self._canonical(), length=64)

    def _canonical(self) -> dict[str, Any]:
        content = self.model_dump(mode="json", exclude={"id", "sources", "documents"}, exclude_defaults=True)
        for principle, written in zip(self.principles, content.get("principles", ()), strict=True):
            if written.get("language") == self.language:
                del written["language"]
            written.pop("sources", None)
            if sources := self.sources_of(principle):
                written["sources"] = [self.documents.get(source, source) for source in sources]
        return content

    @property
    def key(self) -> str:
        """The part of a run directory's name that stands for the constitution: id and start of the digest."""
        return f"{self.id}-{self.digest[:8]}"

    def principle(self, principle_id: str) -> Principle:
        """The principle with this id.

        Raises:
            KeyError: no principle has it.
        """
        return {principle.id: principle for principle in self.principles}[principle_id]

    def rank(self, principle: Principle) -> int:
        """Order in which principles decide a conflict, lowest first: hard ones, then by tier, then those without."""
        return -1 if principle.hard else self.tier_rank(principle)

    def tier_rank(self, principle: Principle) -> int:
        """The index of the principle's tier; principles without a tier come after all tiers."""
        return self.tiers.index(principle.tier) if principle.tier in self.tiers else len(self.tiers)

    def sources_of(self, principle: Principle) -> tuple[str, ...]:
        """The folders whose passages are shown with the principle."""
        return self.sources if principle.sources is None else principle.sources

    def without_folders(self) -> "Constitution":
        """A copy in which folders are replaced by the digests of their documents. Its own digest is the same."""
        principles = tuple(
            principle.model_copy(update={"sources": self._digests_of(principle.sources)})
            for principle in self.principles
        )
        documents = {each: each for each in self.documents.values()}
        return self.model_copy(
            update={"sources": self._digests_of(self.sources), "principles": principles, "documents": documents}
        )

    def _digests_of(self, sources: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """The digests of folders. A folder that no principle uses was never read, so it has none and is left out."""
        return None if sources is None else tuple(self.documents[each] for each in sources if each in self.documents)

    @cached_property
    def worked_examples(self) -> tuple[Example, ...]:
        """Every worked critique and revision: those of the constitution, then those of its principles."""
        own = (
            Example(**dict(example), principle=principle.id)
            for principle in self.principles
            for example in principle.examples
        )
        return *self.examples, *own

    @cached_property
    def worked_comparisons(self) -> tuple[WorkedComparison, ...]:
        """Every worked choice: those of the constitution, then those of its principles."""
        own = (
            WorkedComparison(**dict(comparison), principle=principle.id)
            for principle in self.principles
            for comparison in principle.comparisons
        )
        return *self.comparisons, *own
