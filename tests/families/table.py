"""Writes docs/models.md: what each model family can do, as the checks find it.

python -m tests.families.table > docs/models.md
"""

import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.families.checks import check_encoder, check_family
from tests.families.tiny_families import DECODERS, ENCODERS

INTRODUCTION = """\
# Model families

`python -m tests.families.table > docs/models.md` writes this page, and the tests hold it to what they find.

Each family is tried on a tiny random model of its own architecture, in float32, with LoRA on all linear layers and with
every weight trained:

- **same log-probs**: PPO's sampling and its training pass give the log-probabilities of the model's own logits to
  0.0001 nats, for prompts of unequal lengths and completions that end early, with and without an opening that all
  prompts share. The own logits are those of the saved model, opened by plain `from_pretrained` and run row by row
  without padding or cache; with LoRA the adapter is merged into it.
- **sampled, judged**: the local engine completes greedily like the model alone, and scores a judge's choices with the
  model's own log-probabilities.
- **sft**, **reward**, **dpo**: the stage's loss falls, and plain `from_pretrained` opens what it saves. The reward
  adapter on PPO's trunk gives the saved reward model's scores.
- **ppo**: an iteration lowers the losses of policy and value on its own rollout.

"""

ENCODER_PAGE = """
## Encoders as reward models

`ppo.rewards` takes these by `model:`. Their scores in a padded batch are those of each text alone.

"""


def page(rows: Mapping[str, Mapping[str, str]]) -> str:
    """The whole page from each family's results by column."""
    reasons: list[str] = []
    columns = list(next(iter(rows.values())))
    lines = [["family", "`model_type`", *columns], ["---"] * (len(columns) + 2)]
    for family in DECODERS:
        lines.append([family.name, f"`{family.model_type}`", *_cells(rows[family.name], reasons)])
    encoders = [["family", "`model_type`"], ["---"] * 2, *([each.name, f"`{each.model_type}`"] for each in ENCODERS)]
    notes = "".join(f"{number}. {reason}\n" for number, reason in enumerate(reasons, start=1))
    refused = f"\nRefused, before anything is trained:\n\n{notes}" if notes else ""
    return INTRODUCTION + _table(lines) + refused + ENCODER_PAGE + _table(encoders)


def _cells(results: Mapping[str, str], reasons: list[str]) -> list[str]:
    cells = []
    for result in results.values():
        if result != "yes" and result not in reasons:
            reasons.append(result)
        cells.append("yes" if result == "yes" else f"no ({reasons.index(result) + 1})")
    return cells


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    torch.set_num_threads(1)  # tiny products are slower on several
    rows = {}
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(sys.stderr):
        for family in DECODERS:
            rows[family.name] = check_family(family, Path(root) / family.name)
        for family in ENCODERS:
            check_encoder(family, Path(root) / family.name)
    sys.stdout.write(page(rows))


if __name__ == "__main__":
    main()
