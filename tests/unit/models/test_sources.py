"""Models are found in folders, files, packages and on the hub, and errors say what to do where they are not."""

import importlib.metadata
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from align.errors import InputError
from align.models import sources
from align.models.sources import resolve_model


@pytest.fixture
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(monkeypatch, tmp_path, tiny_model_dir):
    """A file whose conversion is a copy of the tiny model; `calls` counts the conversions."""
    calls = []

    def convert(source, folder):
        calls.append(source)
        shutil.copytree(tiny_model_dir, folder)

    monkeypatch.setattr(sources, "_convert", convert)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return SimpleNamespace(path=path, calls=calls)


def test_folder_resolves_to_itself(tiny_model_dir):
    assert resolve_model(str(tiny_model_dir)) == str(tiny_model_dir)


@pytest.mark.parametrize("path", ["./no/such", "/no/such", "runs/x/sft/model"])
def test_missing_folder(path):
    with pytest.raises(InputError, match="no such folder"):
        resolve_model(path)


def test_hub_id_while_offline_is_refused_with_what_to_do(offline):
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE.*local folder"):
        resolve_model("someone/no-such-model")


def test_hub_id_while_online_is_left_alone(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "_answers", lambda host: True)
    assert resolve_model("someone/no-such-model") == "someone/no-such-model"


def test_hub_id_without_a_network_is_refused_at_once_with_what_to_do(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(InputError, match=r"not in the local cache.*127\.0\.0\.1:9 does not answer; check the network"):
        resolve_model("someone/no-such-model")
    assert time.monotonic() - start < sources.PROBE_SECONDS + 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"no config\.json"),
        (["config.json"], "no weights"),
        (["config.json", "pytorch_model.bin"], "only pickled weights"),
        (["adapter_config.json", "adapter_model.safetensors"], "only an adapter"),
    ],
)
def test_folders_that_hold_no_model(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=message):
        resolve_model(str(tmp_path))


def test_gguf_is_converted_once(gguf, cache):
    first = resolve_model(str(gguf.path))
    assert resolve_model(str(gguf.path)) == first
    assert len(gguf.calls) == 1
    assert first.startswith(str(cache / "models"))


def test_two_processes_at_once_convert_once(gguf, cache, monkeypatch):
    convert = sources._convert

    def slowly(source, folder):
        time.sleep(0.2)
        convert(source, folder)

    monkeypatch.setattr(sources, "_convert", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(resolve_model, [str(gguf.path)] * 2)
    assert first == second
    assert len(gguf.calls) == 1


def test_changed_gguf_is_converted_again(gguf, cache):
    first = resolve_model(str(gguf.path))
    gguf.path.write_bytes(b"other weights")
    assert resolve_model(str(gguf.path)) != first


def test_interrupted_conversion_starts_over(gguf, cache, monkeypatch):
    convert = sources._convert

    def interrupted(source, folder):
        folder.mkdir(parents=True)
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve_model(str(gguf.path))
    monkeypatch.setattr(sources, "_convert", convert)
    names = {path.name for path in sources.Path(resolve_model(str(gguf.path))).iterdir()}
    assert "config.json" in names and "half" not in names


def test_missing_gguf(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        resolve_model(str(tmp_path / "none.gguf"))


def test_file_that_is_not_gguf(cache, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(InputError, match="cannot be read"):
        resolve_model(str(path))
    assert not [folder for folder in (cache / "models").iterdir() if not folder.name.startswith(".")]


def test_cache_that_cannot_be_written(gguf, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="ALIGN_CACHE"):
        resolve_model(str(gguf.path))


def test_package_that_is_not_installed():
    with pytest.raises(InputError, match="pip install no-such-package"):
        resolve_model("wheel:no-such-package")


def test_package_without_a_model():
    with pytest.raises(InputError, match=r"0 \.gguf files"):
        resolve_model("wheel:pytest")


def test_package_with_a_model_is_converted(gguf, cache, monkeypatch):
    file = SimpleNamespace(name="model.gguf", locate=lambda: gguf.path)
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [file])
    assert resolve_model("wheel:some-model") == resolve_model(str(gguf.path))


def quantized(folder, method, tiny_model_dir):
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    return folder


def test_quantized_weights_without_their_package_are_refused(monkeypatch, tmp_path, tiny_model_dir):
    monkeypatch.setitem(sources.QUANTIZERS, "gptq", "no-such-package")
    with pytest.raises(InputError, match=r"quantized with gptq.*pip install no-such-package"):
        resolve_model(str(quantized(tmp_path / "m", "gptq", tiny_model_dir)))


def test_quantized_weights_whose_package_is_installed_pass(monkeypatch, tmp_path, tiny_model_dir):
    monkeypatch.setitem(sources.QUANTIZERS, "gptq", "pytest")
    folder = quantized(tmp_path / "m", "gptq", tiny_model_dir)
    assert resolve_model(str(folder)) == str(folder)


def test_a_path_that_no_file_can_have():
    with pytest.raises(InputError, match="longer than a file's path can be"):
        resolve_model("x" * 5000)
