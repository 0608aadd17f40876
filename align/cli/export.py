"""`align export RUN --output FOLDER`: writes a run's rows as a folder that can be uploaded to the hub as it is.

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
from align.results.exported_rows import DATA_SETS, GENERATED_SOURCES, TEST, TRAIN, DataSet, SplitRow
from align.results.exported_schemas import schema_of
from align.results.published import PublishedRun, read_published
from align.run.artefacts import write_text

CARD = "README.md"
ROW_GROUP_SIZE = 1000
"""How many rows are held in memory, and written as one parquet row group."""


def export_run(
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
        what: names among `DATA_SETS`; by default all that the run has.
        constitution: the run's constitution, for the card, if the run keeps no copy.
        overwrite: replace an earlier export; other files in the folder are left alone.

    Raises:
        InputError: there is no such run; a stage is not done, has no rows, or is out of date; the folder is not empty
            or cannot be written; or the constitution is not the run's.
    """
    complete = read_published(run)
    chosen = _chosen(complete, what)
    published = complete.with_upstream_of(*(stage for each in chosen for stage in (each.stage, each.split_stage)))
    used = constitution_of_run(published, constitution)
    _require_available(output, overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as partial:
            rows = {each.name: _write(each, published, Path(partial)) for each in chosen}
            write_text(Path(partial) / CARD, card_text(_content(published, chosen, rows, used)))
            _move(Path(partial), output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error}); choose another --output") from None
    counts = ", ".join(f"{name}: {count} {split}" for name, splits in rows.items() for split, count in splits.items())
    (console or Console()).print(f"{output}: {counts}", markup=False, highlight=False, soft_wrap=True)


def _chosen(run: PublishedRun, what: Sequence[str]) -> list[DataSet]:
    """The data sets named, or else all that the run has rows of."""
    named = [DATA_SETS[name] for name in dict.fromkeys(what)]
    for each in named:
        run.published_file(each.stage, each.file)
    found = named or [each for each in DATA_SETS.values() if each.stage in run.manifests and _has_rows(run, each)]
    if not found:
        stages = ", ".join(f"`{each.stage}`" for each in DATA_SETS.values())
        raise InputError(f"{run.folder}: nothing to export: none of {stages} is done and has rows; run the recipe")
    return found


def _has_rows(run: PublishedRun, data: DataSet) -> bool:
    return run.published_file(data.stage, data.file).stat().st_size > 0


def constitution_of_run(run: PublishedRun, named: Path | None) -> Constitution | None:
    """The run's constitution: the named file, or the copy that a stage keeps.

    Raises:
        InputError: the named file is not the run's constitution.
    """
    if named is not None:
        found = load_constitution(named)
        used = {digest for _, digest in _constitutions(run)}
        if used and found.digest not in used:
            raise InputError(f"{named}: constitution {found.key}, but the run {run.folder} used another; name its own")
        return found
    for stage, _ in _constitutions(run):
        path = run.stage(stage) / CONSTITUTION
        if path.is_file():
            return read_constitution(run.published_file(stage, CONSTITUTION))
    return None


def _constitutions(run: PublishedRun) -> Iterator[tuple[str, str]]:
    """The stages that use a constitution, with its digest."""
    for stage, manifest in run.manifests.items():
        if used := manifest.settings.get("constitution"):
            yield stage, used["digest"]


def _require_available(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; name a folder with --output")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output}: not empty; name another folder with --output, or add --overwrite")


def _write(data: DataSet, run: PublishedRun, folder: Path) -> dict[str, int]:
    """Write a data set's splits as parquet; returns the number of rows in each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema_of(data.name)
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
        raise InputError(f"{run.stage(data.stage) / data.file}: has no rows; leave {data.name} out of --what")
    return {split: counts[split] for split in (TRAIN, TEST) if counts[split]}


def _batches(rows: Iterable[SplitRow]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of each split, in batches of `ROW_GROUP_SIZE`."""
    waiting: dict[str, list[dict[str, Any]]] = {}
    for split, row in rows:
        batch = waiting.setdefault(split, [])
        batch.append(row)
        if len(batch) == ROW_GROUP_SIZE:
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
    """The number of prompts by source."""
    done = "sample" in run.manifests
    return _by_source(read_rows(run.published_file("sample", "prompts.jsonl"), Prompt)) if done else {}


def _demonstrations(run: PublishedRun, rows: dict[str, dict[str, int]]) -> dict[str, int]:
    """The number of exported demonstrations that were read from files, by source."""
    if "sft" not in rows:
        return {}
    demonstrations = read_rows(run.published_file("sft", "demonstrations.jsonl"), Demonstration)
    return _by_source(row for row in demonstrations if row.source not in GENERATED_SOURCES)


def _by_source(rows: Iterable[Prompt | Demonstration]) -> dict[str, int]:
    return dict(sorted(Counter(row.source for row in rows).items()))


def _move(partial: Path, output: Path) -> None:
    """Replace the files of an earlier export by the new ones; other files in the folder stay."""
    output.mkdir(exist_ok=True)
    (output / "data").mkdir(exist_ok=True)
    for name in DATA_SETS:
        for split in (TRAIN, TEST):
            (output / data_file(name, split)).unlink(missing_ok=True)
    for path in [*sorted((partial / "data").iterdir()), partial / CARD]:
        shutil.move(path, output / path.relative_to(partial))
