"""What every stage must have, whichever file it is in."""

import pytest

from align.run.stage import Stage
from align.run.tracking import METRICS
from align.stages import all_stages

STAGES = list(all_stages().values())


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_publishes_its_figures(stage: Stage) -> None:
    assert METRICS in stage.outputs


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_says_what_it_does_in_a_line(stage: Stage) -> None:
    assert stage.help and not stage.help.endswith(".") and "\n" not in stage.help
