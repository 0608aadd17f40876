"""`align export RUN --output FOLDER`: a run's rows as a folder that can be pushed to the hub as it is.

align export runs/quickstart/style-asking-0a1b2c3d --output exported --what preferences sft
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution
from align.engines.provenance import CONSTITUTION, Provenance, read_constitution
from align.errors import InputError
from align.records import Demonstration, Prompt, read_rows
from align.results.export_card import CardContent, card_text, data_file
from align.results.exported_rows import DATA_SETS, MADE_HERE, TEST, TRAIN, DataSet, SplitRow
from align.results.published import PublishedRun, read_published
from align.run.artefacts import write_text

CARD = "README.md"
ROWS_AT_A_TIME = 1000
"""Rows that are held in memory and written as one row group."""


def main(
    run: Path,
    output: Path,
    *,
    what: Sequence[str] = (),
    constitution: Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> None:
    """Write a run's data sets and their card.

    Args:
        what: names among `DATA_SETS`; all that the run has without any.
        constitution: the run's, for its text in the card, where the run does not keep it.
        overwrite: replace an earlier export, and leave whatever else is in the folder alone.

    Raises:
        InputError: there is no such run, a stage is not done, has no rows, or was made before an earlier one was made
            again, the folder is not empty or cannot be written, or the constitution is another one.
    """
    whole = read_published(run)
    chosen = _chosen(whole, what)
    published = whole.made_into(*(name for each in chosen for name in (each.stage, each.splits_by)))
    text = constitution_of_run(published, constitution)
    _require_room(output, overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as partial:
            rows = {each.name: _write(each, published, Path(partial)) for each in chosen}
            write_text(Path(partial) / CARD, card_text(_content(published, chosen, rows, text)))
            _move(Path(partial), output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error}); choose another --output") from None
    told = ", ".join(f"{name}: {count} {split}" for name, splits in rows.items() for split, count in splits.items())
    (console or Console()).print(f"{output}: {told}", markup=False, highlight=False, soft_wrap=True)


def _chosen(run: PublishedRun, what: Sequence[str]) -> list[DataSet]:
    """The data sets asked for, or all that the run has rows of."""
    asked = [DATA_SETS[name] for name in dict.fromkeys(what)]
    for each in asked:
        run.rows(each.stage, each.file)
    found = asked or [each for each in DATA_SETS.values() if each.stage in run.manifests and _has_rows(run, each)]
    if not found:
        stages = ", ".join(f"`{each.stage}`" for each in DATA_SETS.values())
        raise InputError(f"{run.folder}: nothing to export, for none of {stages} is done and has rows; run the recipe")
    return found


def _has_rows(run: PublishedRun, data: DataSet) -> bool:
    return run.rows(data.stage, data.file).stat().st_size > 0


def constitution_of_run(run: PublishedRun, named: Path | None) -> Constitution | None:
    """The run's constitution: the file that is named, or the copy that a stage keeps.

    Raises:
        InputError: the file's constitution is another one.
    """
    if named is not None:
        found = load_constitution(named)
        used = {digest for _, digest in _constitutions(run)}
        if used and found.digest not in used:
            raise InputError(f"{named}: constitution {found.key}, and the run {run.folder} is of another; name its own")
        return found
    for stage, _ in _constitutions(run):
        path = run.stage(stage) / CONSTITUTION
        if path.is_file():
            return read_constitution(run.rows(stage, CONSTITUTION))
    return None


def _constitutions(run: PublishedRun) -> Iterator[tuple[str, str]]:
    """The stages that follow a constitution, with its digest."""
    for stage, manifest in run.manifests.items():
        if used := manifest.settings.get("constitution"):
            yield stage, used["digest"]


def _require_room(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; name a folder with --output")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output}: not empty; name another folder with --output, or add --overwrite")


def _write(data: DataSet, run: PublishedRun, folder: Path) -> dict[str, int]:
    """Write a data set's splits as parquet; how many rows each has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = data.schema()
    writers: dict[str, pq.ParquetWriter] = {}
    counts: Counter[str] = Counter()
    (folder / "data").mkdir(exist_ok=True)
    try:
        for split, rows in _batches(data.rows(run)):
            if split not in writers:
                writers[split] = pq.ParquetWriter(folder / data_file(data.name, split), schema, compression="zstd")
            writers[split].write_table(pa.Table.from_pylist(rows, schema))
            counts[split] += len(rows)
    finally:
        for writer in writers.values():
            writer.close()
    if not counts:
        raise InputError(f"{run.stage(data.stage) / data.file}: no row in it; leave {data.name} out with --what")
    return {split: counts[split] for split in (TRAIN, TEST) if counts[split]}


def _batches(rows: Iterable[SplitRow]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of each split, some at a time."""
    waiting: dict[str, list[dict[str, Any]]] = {}
    for split, row in rows:
        batch = waiting.setdefault(split, [])
        batch.append(row)
        if len(batch) == ROWS_AT_A_TIME:
            yield split, waiting.pop(split)
    yield from waiting.items()


def _content(
    run: PublishedRun, chosen: Sequence[DataSet], rows: dict[str, dict[str, int]], constitution: Constitution | None
) -> CardContent:
    entries: dict[str, Provenance] = {}
    for stage in dict.fromkeys(("sample", "revise", *(each.stage for each in chosen))):
        entries |= run.provenance(stage)
    return CardContent(run, rows, list(entries.values()), constitution, _prompts(run), _demonstrations(run, rows))


def _prompts(run: PublishedRun) -> dict[str, int]:
    """How many prompts come from where."""
    if "sample" not in run.manifests:
        return {}
    found = read_rows(run.rows("sample", "prompts.jsonl"), Prompt)
    return dict(sorted(Counter(prompt.source for prompt in found).items()))


def _demonstrations(run: PublishedRun, rows: dict[str, dict[str, int]]) -> dict[str, int]:
    """How many exported demonstrations were read from where."""
    if "sft" not in rows:
        return {}
    found = read_rows(run.rows("sft", "demonstrations.jsonl"), Demonstration)
    return dict(sorted(Counter(row.source for row in found if row.source not in MADE_HERE).items()))


def _move(partial: Path, output: Path) -> None:
    """Put the new files in place of an earlier export's; other files in the folder stay."""
    output.mkdir(exist_ok=True)
    (output / "data").mkdir(exist_ok=True)
    for name in DATA_SETS:
        for split in (TRAIN, TEST):
            (output / data_file(name, split)).unlink(missing_ok=True)
    for path in [*sorted((partial / "data").iterdir()), partial / CARD]:
        shutil.move(path, output / path.relative_to(partial))
