"""Two quick stages that replace the pipeline's stages in tests of how stages are run."""

from pathlib import Path

FAKES = Path(__file__).parent


def add_fake_stages() -> None:
    """Let this process find the fake stages in addition to the real ones."""
    import align.stages

    folder = str(FAKES / "stages")
    if folder not in align.stages.__path__:
        align.stages.__path__.append(folder)
    align.stages.all_stages.cache_clear()


def remove_fake_stages() -> None:
    """Undo `add_fake_stages`."""
    import align.stages

    align.stages.__path__.remove(str(FAKES / "stages"))
    align.stages.all_stages.cache_clear()
