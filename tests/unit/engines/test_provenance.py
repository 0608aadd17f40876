"""Provenance entries: digests of weights, what servers report about their models, and what is never written."""

import dataclasses
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from faulty_server import FaultyServer, chat_reply
from scripted_engine import ScriptedEngine

from align.engines.engine import Engine, EngineIdentity
from align.engines.open import open_engine
from align.engines.openai_server import OpenAIEngine
from align.engines.provenance import (
    Provenance,
    pin_identity,
    pin_judge,
    read_provenance,
    text_provenance,
    write_provenance,
)
from align.errors import AlignError, InputError
from align.models.weights import Weights, hub_revision, loaded_files
from align.run.artefacts import Manifest, write_json
from align.run.stage import Context
from align.settings.blocks import EngineBlock, ModelBlock
from align.stages.sample import SampleBlock


def shell(command: str, folder: Path) -> str:
    return subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_digest_of_one_file_is_that_of_sha256sum(tiny_model_dir: Path) -> None:
    assert Weights(tiny_model_dir).digest() == shell("sha256sum model.safetensors", tiny_model_dir).split()[0]


def test_the_digest_of_several_files_is_that_of_sha256sum_over_the_loaded_ones(tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (2, 1)]
    for name in (*names, "consolidated.safetensors"):
        (tmp_path / name).write_text(name)
    index = {"weight_map": {"b": names[0], "a": names[1], "c": names[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Weights(tmp_path).digest() == shell("sha256sum model-*.safetensors | sha256sum", tmp_path).split()[0]


def test_only_files_that_are_loaded_count(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A single weight file takes precedence over an index beside it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(loaded_files(tmp_path)) == len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        model.lm_head.weight.fill_(3.0)
    model.save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole/model.safetensors", tmp_path)
    assert (AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight == 3.0).all()
    assert loaded_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_only_changed_weight_files_are_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("one")
    first = Weights(tmp_path)
    digest = first.digest()
    again = Weights(tmp_path)
    again.digests.update(first.digests)
    read: list[Path] = []
    monkeypatch.setattr("align.models.weights.file_digest", lambda path: read.append(path) or "read")
    assert again.digest() == digest and not read
    file.write_text("three")
    assert again.digest() == "read" and read == [file]


def test_the_digest_comes_from_the_stages_manifest_unless_the_file_was_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    file, manifest = tmp_path / "model/model.safetensors", tmp_path / "manifest.json"
    file.write_text("weights")
    write_json(manifest, Manifest("sft", "f", {}, {}, {"model/model.safetensors": "told"}).__dict__)
    assert Weights(file.parent).digest() == "told"
    time.sleep(0.02)  # the resolution of file times is coarse
    other = tmp_path / "other.safetensors"
    other.write_text("other weights")
    os.utime(other, ns=(0, 0))
    os.replace(other, file)
    assert Weights(file.parent).digest() == shell("sha256sum model.safetensors", file.parent).split()[0]


def test_resuming_with_other_weights_is_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    output = tmp_path / "stage"
    output.mkdir()
    first = pin_identity(local_engine(model), output, "label")
    assert pin_identity(local_engine(model), output, "label") == first
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"not the model that this stage began with \(digest \w+ before, \w+ now\)"):
        pin_identity(local_engine(model), output, "label")


def local_engine(model: Path) -> Engine:
    return open_engine(EngineBlock(), ModelBlock(path=str(model), precision="fp32"))


def test_a_local_engines_identity_is_its_model_weights_and_precision(tiny_model_dir: Path) -> None:
    identity = open_engine(EngineBlock(), ModelBlock(path=str(tiny_model_dir), precision="fp32")).identity()
    assert identity == EngineIdentity(
        "local", tiny_model_dir.name, Weights(tiny_model_dir).digest(), precision="float32"
    )


def test_the_revision_is_read_from_the_hub_caches_folder() -> None:
    assert hub_revision(Path("cache/models--a--b/snapshots/0123abc")) == "0123abc"
    assert hub_revision(Path("runs/mine/sft/model")) == ""


@pytest.mark.parametrize("field", [each.name for each in dataclasses.fields(EngineIdentity)])
def test_every_field_of_the_identity_changes_the_entrys_id(field: str) -> None:
    others: dict[str, Any] = {"kind": "server", "said": {"id": "x"}}
    known = EngineIdentity("local", "m", "d", "r", "bf16")
    changed = dataclasses.replace(known, **{field: others.get(field, "other")})
    ids = {Provenance.of("sample", "completion", each, {"top_p": 1.0}, 0).id for each in (known, known, changed)}
    assert len(ids) == 2


def test_entries_of_earlier_stages_are_copied_beside_a_stages_own(tmp_path: Path) -> None:
    first, second = (Provenance.of(stage, "label", EngineIdentity("rule", ""), {}, 0) for stage in ("a", "b"))
    for folder in ("a", "b", "none"):
        (tmp_path / folder).mkdir()
    write_provenance(tmp_path / "a", [first])
    write_provenance(tmp_path / "b", [second], [tmp_path / "a", tmp_path / "none"])
    assert read_provenance(tmp_path / "b") == {first.id: first, second.id: second}
    assert read_provenance(tmp_path / "none") == {}


def server_engine(server: FaultyServer, **changes: Any) -> EngineBlock:
    block = {"kind": "openai", "model": "asked-for", "base_url": server.base_url, "max_retries": 0}
    return EngineBlock.model_validate(block | changes)


def listing(server: FaultyServer, *models: dict[str, str], status: int = 200) -> None:
    """Make the server list these models."""
    answering(server, json.dumps({"object": "list", "data": list(models)}).encode(), status)


def answering(server: FaultyServer, content: bytes, status: int = 200) -> None:
    """Make the server answer a request for its models with this."""

    def do_get(handler: Any) -> None:
        handler.wfile.write(handler._http(status, content))

    server.RequestHandlerClass = type("Listing", (server.RequestHandlerClass,), {"do_GET": do_get})


def test_a_servers_description_of_its_model_is_kept_as_unverified() -> None:
    with FaultyServer() as server:
        identity = OpenAIEngine(server_engine(server)).identity()
    assert identity == EngineIdentity("server", "asked-for", said={"id": "served"})
    entry = Provenance.of("sample", "completion", identity, {}, 0)
    assert not entry.verified and entry.model_digest == ""


def test_of_several_listed_models_the_requested_one_counts_and_no_server_path_is_kept() -> None:
    with FaultyServer() as server:
        named = {"id": "asked-for", "root": "/home/me/secret-project/weights", "owned_by": "vllm"}
        listing(server, {"id": "another"}, named)
        said = OpenAIEngine(server_engine(server)).identity().said
        listing(server, {"id": "one"}, {"id": "two"})
        unnamed = OpenAIEngine(server_engine(server)).identity().said
    assert said == {"id": "asked-for", "root": "weights", "owned_by": "vllm"}
    assert unnamed == {}


def test_a_server_that_lists_no_models_is_accepted() -> None:
    with FaultyServer() as server:
        listing(server, status=404)
        assert OpenAIEngine(server_engine(server)).identity().said == {}


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"null", b"[]", b'{"data": ["a"]}', b'{"data": [{"name": "x"}]}', b'{"data": [{"id":']
)
def test_a_malformed_list_of_models_gives_no_description_and_models_reports_it(content: bytes) -> None:
    with FaultyServer() as server:
        answering(server, content)
        engine = OpenAIEngine(server_engine(server))
        assert engine.identity().said == {}
        with pytest.raises(AlignError, match=r"does not follow the protocol.*align engine check"):
            engine.models()


@pytest.mark.parametrize("content", [b"", b'{"data": [{"id":'])
def test_a_garbled_list_of_models_is_requested_again(content: bytes, monkeypatch: Any) -> None:
    monkeypatch.setattr("align.engines.server_faults.INITIAL_DELAY", 0.01)
    replies = iter([content, b'{"data": [{"id": "served"}]}'])
    with FaultyServer() as server:
        handler = server.RequestHandlerClass
        answer = {"do_GET": lambda self: self.wfile.write(self._http(200, next(replies)))}
        server.RequestHandlerClass = type("Garbling", (handler,), answer)
        assert OpenAIEngine(server_engine(server, max_retries=1)).identity().said == {"id": "served"}


def test_resuming_a_judge_whose_server_no_longer_shows_log_probabilities_is_an_error(tmp_path: Path) -> None:
    shown = [{"token": letter, "logprob": -1.0} for letter in "AB"]
    scored = {"content": [{"token": "A", "logprob": -1.0, "top_logprobs": shown}]}
    with FaultyServer(lambda path, body: chat_reply("A", logprobs=scored)) as server:
        pin_judge(OpenAIEngine(server_engine(server)), tmp_path)
        pin_judge(OpenAIEngine(server_engine(server)), tmp_path)
    pin_judge(OpenAIEngine(server_engine(server)), tmp_path)  # the server has stopped
    with FaultyServer(lambda path, body: chat_reply("A")) as server:
        voting = OpenAIEngine(server_engine(server))
        with pytest.raises(InputError, match=r"by vote of 8 samples now, and by log-probabilities when"):
            pin_judge(voting, tmp_path)


def test_resuming_with_another_model_on_the_server_is_an_error(tmp_path: Path) -> None:
    with FaultyServer() as server:
        engine = OpenAIEngine(server_engine(server))
        first = pin_identity(engine, tmp_path, "revision")
        assert pin_identity(engine, tmp_path, "revision") == first
        listing(server, {"id": "exchanged"})
        with pytest.raises(InputError, match=r"exchanged.* reported .*served.*when this stage began"):
            pin_identity(engine, tmp_path, "revision")


def test_resuming_without_the_server_keeps_the_pinned_identity(tmp_path: Path) -> None:
    with FaultyServer() as server:
        engine = OpenAIEngine(server_engine(server))
        first = pin_identity(engine, tmp_path, "revision")
    assert pin_identity(engine, tmp_path, "revision") == first


def test_an_entry_has_no_address_no_key_and_no_text_of_extra_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    extra = {"top_k": 5, "service_token": "hush-hush", "headers": {"authorization": "Bearer hush-hush"}}
    engine = EngineBlock(kind="openai", model="m", base_url="http://inner.example/v1/hush-hush", extra=extra)
    context = Context("sample", SampleBlock(), {"model": ModelBlock(path="p")}, {}, tmp_path, 3, "run", None)  # type: ignore[arg-type]
    entry = text_provenance(context, "completion", ScriptedEngine(lambda request: ""), engine)
    written = json.dumps(entry.to_json())
    assert "hush" not in written and "secret" not in written and "inner.example" not in written
    assert entry.settings["extra"]["top_k"] == 5 and "service_token" in entry.settings["extra"]
    assert (entry.settings["temperature"], entry.settings["top_p"], entry.seed) == (1.0, 1.0, 3)
