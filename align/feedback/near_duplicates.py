"""Texts that nearly repeat an earlier one, found by MinHash (Broder 1997), with the index on disk.

The signature's bands only propose candidates; the words decide, by the exact Jaccard similarity of three-word shingles.
"""

import hashlib
import zlib

from align.figures.sentences import fold
from align.figures.text_metrics import words
from align.run.streaming import scratch_database

SHINGLE = 3
MIN_WORDS = 12
BANDS, ROWS = 16, 4
"""Texts of similarity 0.8 share one of 16 bands of 4 in 99.98% of cases, texts of 0.3 in 12%."""
MODULUS = 2**31 - 1


class NearDuplicates:
    """Remembers texts, and tells which nearly repeat one of them.

    Args:
        similarity: Jaccard similarity of shingles from which a text is a repetition.
    """

    def __init__(self, similarity: float) -> None:
        import numpy as np

        draw = np.random.default_rng(0)
        self._similarity = similarity
        self._factors = draw.integers(1, MODULUS, (BANDS * ROWS, 1), dtype=np.int64)
        self._offsets = draw.integers(0, MODULUS, (BANDS * ROWS, 1), dtype=np.int64)
        self._database = scratch_database(
            "create table texts (number integer primary key, text text);"
            "create table bands (band text, number integer); create index by_band on bands (band)"
        )

    def is_repeated(self, text: str, group: str = "") -> bool:
        """Whether an earlier text of the group is nearly this one; if not, it is remembered. Short ones never are."""
        shingles = _shingles(text)
        if len(shingles) < MIN_WORDS - SHINGLE + 1:
            return False
        bands = self._bands(shingles, group)
        marks = ",".join("?" * len(bands))
        candidates = self._database.execute(
            f"select distinct texts.text from bands join texts using (number) where band in ({marks})", bands
        )
        if any(_jaccard(shingles, _shingles(earlier)) >= self._similarity for (earlier,) in candidates):
            return True
        number = self._database.execute("insert into texts (text) values (?)", (text,)).lastrowid
        self._database.executemany("insert into bands values (?, ?)", [(band, number) for band in bands])
        return False

    def _bands(self, shingles: set[str], group: str) -> list[str]:
        import numpy as np

        hashes = np.array([zlib.crc32(each.encode()) % MODULUS for each in shingles], dtype=np.int64)
        # Below 2^31 times below 2^31 is below 2^62: no overflow.
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
