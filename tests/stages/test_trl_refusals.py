"""An option that only TRL itself knows to be wrong is reported under the `trl` block's name."""

from pathlib import Path
from typing import Any

import pytest

from align.errors import InputError
from tests.stages.test_training import OPTIMIZER, stage_named, upstreams
from tests.stages.training import pair, run, upstream


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("sft", {"loss_type": "nope"}),
        ("dpo", {"loss_type": ["nope"]}),
        ("reward", {"optim": "nope"}),
    ],
)
def test_a_value_that_trl_refuses_is_reported_under_the_blocks_key(
    stage: str, options: dict[str, Any], tmp_path: Path, tiny_model_dir: Path
) -> None:
    inputs = upstreams(tmp_path, tiny_model_dir)
    inputs["compare"] = upstream(tmp_path, "compare", pairs=[pair(number) for number in range(8)])
    settings = {"optimizer": OPTIMIZER, "trl": options}
    with pytest.raises(InputError, match=rf"{stage}\.trl: .*nope"):
        run(stage_named(stage), settings, tiny_model_dir, tmp_path / "out", inputs)
