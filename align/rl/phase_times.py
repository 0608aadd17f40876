"""Times the phases of an iteration."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Seconds spent in each phase since the last reset."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    def reset(self) -> None:
        """Set all times to zero."""
        self._seconds.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context whose duration is added to the phase."""
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def timings(self, tokens: int) -> dict[str, float]:
        """Seconds, and completion tokens per second, of each phase and of all phases together."""
        seconds = {f"_{phase}": value for phase, value in self._seconds.items()}
        seconds[""] = sum(self._seconds.values())
        rates = {f"tokens_per_second{phase}": tokens / max(value, 1e-9) for phase, value in seconds.items()}
        return {f"seconds{phase}": value for phase, value in seconds.items()} | rates
