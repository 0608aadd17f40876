"""The finished tiny pipeline that the tests of the real command start from."""

import pytest

from tests.launch.pipeline import Run, build_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run made by `align run RECIPE`, undisturbed and in one process. Never write into it: take a copy."""
    run = build_run(tmp_path_factory.mktemp("pipeline"))
    run.make("run", "tiny.yaml")
    return run
