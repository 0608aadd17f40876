"""Folders of documents become numbered passages, or their faults are reported."""

from pathlib import Path

import pytest

from align.constitution.documents import MAX_PASSAGE, read_documents
from align.constitution.loading import load_constitution
from align.errors import FileProblems, InputError


def folder(root: Path, **files: str) -> Path:
    directory = root / "facts"
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        (directory / f"{stem}.{suffix}").write_text(text, encoding="utf-8")
    return directory


def test_passages_are_paragraphs_rows_and_paragraphs_under_their_heading(tmp_path: Path) -> None:
    directory = folder(
        tmp_path,
        notes_txt="One\nline.\n\n\nTwo.\n",
        rivers_md="Rivers.\n\n# Danube #\n\nIt is long.\n\n- blue\n# Rhine\nIt is wide.\n",
        rows_jsonl='{"text": "First."}\n{"text": "Second.", "source": "x"}\n',
    )
    (directory / ".hidden.pdf").write_bytes(b"\xff")

    assert [(passage.id, passage.text) for passage in read_documents(directory).passages] == [
        ("notes.txt#1", "One line."),
        ("notes.txt#2", "Two."),
        ("rivers.md#1", "Rivers."),
        ("rivers.md#2", "Danube: It is long."),
        ("rivers.md#3", "Danube: - blue"),
        ("rivers.md#4", "Rhine: It is wide."),
        ("rows.jsonl#1", "First."),
        ("rows.jsonl#2", "Second."),
    ]


def test_long_paragraphs_are_cut_between_sentences_and_lose_nothing(tmp_path: Path) -> None:
    text = " ".join(f"The sentence of number {number} says little more." for number in range(100))
    cut = read_documents(folder(tmp_path, a_txt=text)).passages
    endless = read_documents(folder(tmp_path, a_txt="x" * 2000)).passages

    assert all(len(passage.text) <= MAX_PASSAGE and passage.text.endswith("more.") for passage in cut)
    assert " ".join(passage.text for passage in cut) == text
    assert [len(passage.text) for passage in endless] == [800, 800, 400]


def test_a_byte_order_mark_hides_no_heading_and_no_row(tmp_path: Path) -> None:
    directory = folder(tmp_path, a_md="\ufeff# Danube\n\nIt is long.\n", b_jsonl='\ufeff{"text": "First."}\n')

    assert [passage.text for passage in read_documents(directory).passages] == ["Danube: It is long.", "First."]


@pytest.mark.parametrize("target", [".", "nothing"])
def test_a_link_that_is_not_followed_is_reported(tmp_path: Path, target: str) -> None:
    directory = folder(tmp_path, a_txt="One.")
    (directory / "more").symlink_to(tmp_path / target)

    with pytest.raises(InputError, match=r"more: a link to a folder or to nothing"):
        read_documents(directory)


def test_the_digest_covers_names_and_texts_but_not_the_folder_s_place(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    here = read_documents(folder(tmp_path, a_txt="One.", b_txt="Two."))
    there = read_documents(folder(tmp_path / "x", a_txt="One.", b_txt="Two."))
    other = read_documents(folder(tmp_path / "x", b_txt="Two?"))

    assert here.digest == there.digest != other.digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"x", "a.pdf: not one of .txt, .md, .jsonl; convert it"),
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8 text (byte 3); save it as UTF-8"),
        ("a.txt", b" \n", "facts: no document contains text; add .txt, .md, .jsonl files"),
        ("a.jsonl", b'{"words": "x"}', "a.jsonl, row 1: has no `text`"),
        ("a.jsonl", b"{", "a.jsonl, line 1: not JSON"),
        ("a]\nb.txt", b"x", "its name cannot be cited; use only letters"),
    ],
)
def test_files_that_are_not_documents_are_reported(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    directory = folder(tmp_path)
    (directory / name).write_bytes(content)

    with pytest.raises(InputError) as raised:
        read_documents(directory)
    assert message in str(raised.value)


def test_links_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    (folder(tmp_path) / "a.txt").symlink_to(tmp_path / "secret.txt")

    with pytest.raises(InputError, match="a link that leads out of the folder"):
        read_documents(tmp_path / "facts")


def constitution(root: Path, text: str, name: str = "c.yaml") -> Path:
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def test_sources_belong_to_the_constitution_or_a_principle_and_are_inherited(tmp_path: Path) -> None:
    for name in ("facts", "own"):
        (tmp_path / "deep" / name).mkdir(parents=True)
        (tmp_path / "deep" / name / f"{name}.txt").write_text("Text.")
    constitution(
        tmp_path / "deep",
        "title: x\nsources: facts\nprinciples:\n  - {id: a, text: a}\n  - {id: b, text: b, sources: [own]}\n"
        "  - {id: c, text: c, sources: []}\n",
    )
    child = load_constitution(
        constitution(tmp_path, "title: x\nextends: deep/c.yaml\nprinciples:\n  - {id: d, text: d}\n")
    )

    shown = {each.id: [Path(path).name for path in child.sources_of(each)] for each in child.principles}
    assert shown == {"a": ["facts"], "b": ["own"], "c": [], "d": ["facts"]}
    assert all(Path(source).is_dir() for each in child.principles for source in child.sources_of(each))


def test_one_letter_of_a_document_changes_the_constitution(tmp_path: Path) -> None:
    folder(tmp_path, a_txt="One.")
    path = constitution(tmp_path, "title: x\nsources: facts\nprinciples:\n  - {id: a, text: a}\n")
    before = load_constitution(path).digest
    folder(tmp_path, a_txt="One!")

    assert load_constitution(path).digest != before


def test_faulty_sources_are_reported_with_their_line(tmp_path: Path) -> None:
    folder(tmp_path, a_txt="One.")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.txt").write_text("Two.")
    path = constitution(
        tmp_path,
        "title: x\nsources:\n  - facts\n  - more\nprinciples:\n  - id: a\n    text: a\n    sources: [none]\n",
    )

    with pytest.raises(FileProblems) as raised:
        load_constitution(path)
    first, second = (str(problem) for problem in raised.value.problems)
    assert first == (
        "line 4  sources[1]: more and facts both hold a.txt, so that its passages' ids are ambiguous; rename one file"
    )
    assert second.startswith("line 8  principles[0].sources[0]: ") and "none: no such folder" in second


def test_null_bytes_are_not_text_although_they_are_utf_8(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.txt: not text, as it contains null bytes"):
        read_documents(folder(tmp_path, a_txt="PK\0\0\0"))
