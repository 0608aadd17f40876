"""Resolving where a model comes from: a folder, a hub id, a .gguf file, or a Python package that contains one.

A .gguf file is converted once to a folder of safetensors in the cache (`ALIGN_CACHE`, by default `~/.cache/align`).
"""

import importlib.metadata
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from align.errors import InputError, name_fault
from align.run.artefacts import file_digest

WHEEL = "wheel:"
CONVERSION = 1
"""Part of a converted model's folder name. Increment it whenever the conversion below writes different files."""

PROBE_SECONDS = 5
"""How long the hub may take to answer before it counts as unreachable. Its own client would retry for a minute."""

QUANTIZERS = {
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "aqlm": "aqlm",
    "compressed-tensors": "compressed-tensors",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
}
"""The package that transformers needs for each method of quantization."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(path: str, *, revision: str | None = None) -> str:
    """The path that `from_pretrained` loads: a local folder, or a hub id unchanged.

    Raises:
        InputError: the folder, file or package is missing, the folder has no safetensors weights, or the hub id is not
            in the local cache and the hub cannot be reached.
    """
    if fault := model_fault(path):
        raise InputError(f"model {path}: {fault}")
    if path.startswith(WHEEL):
        return str(converted(_ggufs_of_package(path.removeprefix(WHEEL))[0]))
    local = Path(path).expanduser()
    if path.endswith(".gguf"):
        return str(converted(local))
    if local.is_dir():
        return str(local)
    _check_hub(path, revision)
    return path


def model_fault(path: str) -> str | None:
    """What is wrong with a model path, checked without loading the model or asking the hub; None if nothing is."""
    if fault := name_fault(path):
        return fault
    if path.startswith(WHEEL):
        return _package_fault(path.removeprefix(WHEEL))
    local = Path(path).expanduser()
    if path.endswith(".gguf"):
        return None if local.is_file() else f"no such file (looked in {Path.cwd()}); check the path"
    if local.is_dir():
        return _folder_fault(local)
    if local.exists():
        return "it is a file; give the folder that `save_pretrained` wrote, or a .gguf file"
    if path.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(path):
        return f"no such folder (looked in {Path.cwd()}); check the path"
    return None


def converted(gguf: Path) -> Path:
    """The safetensors folder of a .gguf file, which is converted the first time.

    Raises:
        InputError: the file cannot be read as a language model, or the cache folder cannot be written.
    """
    from filelock import FileLock

    cache = Path(os.environ.get("ALIGN_CACHE") or Path.home() / ".cache" / "align").expanduser() / "models"
    folder = cache / f"{gguf.stem}-{file_digest(gguf)[:12]}-{CONVERSION}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                partial = folder.with_name(f".{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                _convert(gguf, partial)
                os.replace(partial, folder)
    except OSError as error:
        raise InputError(
            f"{cache}: the converted model cannot be written there ({error.strerror or error}); "
            "free some disk space, or set the environment variable ALIGN_CACHE to another folder"
        ) from error
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model in a .gguf file as fp32 safetensors, with its tokenizer and generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        quantized = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    except Exception as error:  # the reader of a damaged file can raise anything
        raise InputError(f"model {gguf}: cannot be read as a language model ({error})") from error
    _split_digits(tokenizer, gguf)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)
    with torch.device("meta"):
        model = type(quantized)(type(quantized.config).from_dict(settings))
    model.load_state_dict(quantized.state_dict(), assign=True, strict=False)
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any, gguf: Path) -> None:
    """Restore a SmolLM tokenizer's first step, which splits numbers into digits and is lost in reading .gguf files."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    step = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if step is not None and step.contents() == "smollm":
        engine = tokenizer.backend_tokenizer
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), engine.pre_tokenizer]
        )


def _package_fault(name: str) -> str | None:
    try:
        found = _ggufs_of_package(name)
    except importlib.metadata.PackageNotFoundError:
        return f"no such Python package is installed; install it with `pip install {name}`"
    if len(found) == 1:
        return None
    return f"the package contains {len(found)} .gguf files, but exactly one is needed; give the path of the file itself"


def _ggufs_of_package(name: str) -> list[Path]:
    files = importlib.metadata.files(name) or []
    return [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]


def _folder_fault(folder: Path) -> str | None:
    names = {file.name for file in folder.iterdir()}
    if "config.json" not in names:
        if "adapter_config.json" in names:
            return "the folder contains only an adapter; give the merged model, which is in `model/` beside it"
        return "the folder has no config.json; give the folder that `save_pretrained` wrote"
    if any(name.endswith(".safetensors") for name in names):
        return _quantization_fault(folder / "config.json")
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return (
            "the folder has only pickled weights, which can run code when they are loaded; "
            "if you trust them, convert them to safetensors (`model.save_pretrained(folder)`)"
        )
    return "the folder has no weights (*.safetensors); was it copied or downloaded completely?"


def _quantization_fault(config: Path) -> str | None:
    """Which package the quantized weights of a folder need, if it is not installed."""
    try:
        settings = json.loads(config.read_bytes())
        method = settings["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # not quantized; a damaged configuration is reported when the model is loaded
    package = QUANTIZERS.get(str(method))
    if package is None or _is_installed(package):
        return None
    return (
        f"its weights are quantized with {method}, and the package {package} is not installed; give the model that it "
        f"was quantized from, which can also be trained, or, if it is only to be asked, `pip install {package}`"
    )


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_hub(path: str, revision: str | None) -> None:
    """Refuse a hub id that is not in the cache while the hub is unreachable. One short request checks that."""
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
        return
    nowhere = f"model {path}: no such folder (looked in {Path.cwd()}), and it cannot be fetched as a hub id: "
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"{nowhere}HF_HUB_OFFLINE is set and it is not in the local cache; unset it, or give a local folder"
        )
    if not _answers(constants.ENDPOINT):
        raise InputError(
            f"{nowhere}it is not in the local cache ({constants.HF_HUB_CACHE}) and {constants.ENDPOINT} does not "
            "answer; check the network (HF_ENDPOINT names a mirror), or give a local folder"
        )


def _answers(host: str) -> bool:
    """Whether a host sends any response, even an error page."""
    try:
        urllib.request.urlopen(urllib.request.Request(host, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
