"""Finds texts that nearly repeat an earlier one by MinHash (Broder 1997), with the index on disk.

The bands of the MinHash signature only propose candidates. The exact Jaccard similarity of three-word shingles decides.
"""

import hashlib
import zlib

import numpy as np

from align.figures.sentences import fold
from align.figures.text_metrics import words
from align.run.streaming import scratch_database

SHINGLE = 3
MIN_WORDS = 12
BANDS, ROWS = 16, 4
"""Texts of similarity 0.8 share at least one of 16 bands of 4 in 99.98% of cases, texts of similarity 0.3 in 12%."""
MODULUS = 2**31 - 1


class NearDuplicateIndex:
    """Remembers texts and tells which later ones nearly repeat one of them.

    Args:
        similarity: Jaccard similarity of shingles from which a text counts as a near-duplicate; None: none ever does.
    """

    def __init__(self, similarity: float | None) -> None:
        draw = np.random.default_rng(0)
        self._similarity = similarity
        self._factors = draw.integers(1, MODULUS, (BANDS * ROWS, 1), dtype=np.int64)
        self._offsets = draw.integers(0, MODULUS, (BANDS * ROWS, 1), dtype=np.int64)
        self._database = scratch_database(
            "create table texts (number integer primary key, text text);"
            "create table bands (band text, number integer); create index by_band on bands (band)"
        )

    def is_repeated(self, text: str, group: str = "") -> bool:
        """Whether the text nearly repeats an earlier one of its group; if not, remembers it. Short texts never do."""
        shingles = _shingles(text)
        if self._similarity is None or len(shingles) < MIN_WORDS - SHINGLE + 1:
            return False
        bands = self._bands(shingles, group)
        placeholders = ",".join("?" * len(bands))
        candidates = self._database.execute(
            f"select distinct texts.text from bands join texts using (number) where band in ({placeholders})", bands
        )
        if any(_jaccard(shingles, _shingles(earlier)) >= self._similarity for (earlier,) in candidates):
            return True
        number = self._database.execute("insert into texts (text) values (?)", (text,)).lastrowid
        self._database.executemany("insert into bands values (?, ?)", [(band, number) for band in bands])
        return False

    def _bands(self, shingles: set[str], group: str) -> list[str]:
        hashes = np.array([zlib.crc32(each.encode()) % MODULUS for each in shingles], dtype=np.int64)
        # Both factors are below 2^31, so the product is below 2^62 and does not overflow.
        lowest = ((self._factors * hashes + self._offsets) % MODULUS).min(axis=1).reshape(BANDS, ROWS)
        return [
            hashlib.blake2b(f"{group} {number} ".encode() + row.tobytes(), digest_size=8).hexdigest()
            for number, row in enumerate(lowest)
        ]


def _shingles(text: str) -> set[str]:
    found = words(fold(text))
    return {" ".join(found[start : start + SHINGLE]) for start in range(len(found) - SHINGLE + 1)}


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)
