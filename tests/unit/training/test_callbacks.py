"""Which checkpoint training resumes from."""

from pathlib import Path

from align.training.callbacks import COMPLETE, last_checkpoint


def test_the_newest_complete_checkpoint_counts_and_half_written_ones_do_not(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, whole in ((5, True), (10, True), (15, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        if whole:
            (folder / COMPLETE).touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
