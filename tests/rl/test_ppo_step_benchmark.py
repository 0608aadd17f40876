"""The benchmark of a PPO step, on a tiny model: the invariants of its measurements."""

import ppo_step
import pytest
import torch

from align.models.loading import load_causal_lm


@pytest.mark.parametrize("name", [name for name in ppo_step.OURS if "4 epochs" not in name])
def test_invariants_of_a_step(tiny_model_dir, tmp_path, name):
    ppo_step.make_reward(tmp_path, str(tiny_model_dir))
    found = ppo_step.measure(
        ppo_step.OURS[name],
        2,
        tmp_path,
        model=str(tiny_model_dir),
        rollout=16,
        new_tokens=12,
        micro_batch=4,
    )
    assert found["first_log_ratio"] < 0.1, "the first minibatch is trained by the policy that sampled it"
    assert found["padding_share"] < 0.1
    trunk = sum(parameter.numel() for parameter in load_causal_lm(str(tiny_model_dir), torch.float32).parameters())
    adapters = 2 * 16 * 7 * (64 + 128)  # at most: two layers of seven, rank 16
    assert trunk < found["weights"] < trunk + 3 * adapters + 200, "policy, value and reward adapters on one trunk"
    assert len(found["seconds"]) == 2 and min(found["seconds"]) > 0


def test_tables_are_written_between_their_marks(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{ppo_step.MARKS[0]}\nold\n{ppo_step.MARKS[1]}\nafter\n")
    monkeypatch.setattr(ppo_step, "DOCS", page)
    head = {"seconds": [2.0, 1.0, 3.0], "peak_gb": 1.5, "phases": {"seconds_train": 1.0}, "padding_share": 0.05}
    rows = {"align, value head": head, "TRL 1.12, LoRA policy, fp32": {"seconds": [8.0], "peak_gb": 9.0}}
    ppo_step.write_down(f"{ppo_step.table(rows)}\n\n{ppo_step.phases(rows)}")
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| align, value head | 2.0 | 1.0-3.0 | 1.00 | 1.5 |" in text
    assert "| TRL 1.12, LoRA policy, fp32 | 8.0 | 8.0-8.0 | 4.00 | 9.0 |" in text
    assert "| align, value head | 1.0 | 5.0% |" in text
