"""Decoding in two processes with weights sharded over both."""

import json
import subprocess
import sys

import torch

from align.decoding.decode import decode
from align.models.loading import load_causal_lm

PROGRAM = """
import json, sys
import torch
from torch.distributed.fsdp import fully_shard
from align.decoding.decode import decode
from align.models.logprobs import completion_logprobs
from align.models.loading import load_causal_lm

rank, folder, store, stops = int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
model = load_causal_lm(folder, torch.float32)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
calls = []
model.register_forward_hook(lambda *_: calls.append(1))
prompts = [[1, 40, 41, 42], [1, 90], [1, 17, 18]] if rank == 0 else []
decoded = decode(
    model, prompts, seeds=list(range(len(prompts))), max_new_tokens=10, temperature=1.0, stop_ids=stops, pad_id=1,
    synced=True,
)
steps = len(calls)
ids = torch.tensor([[1, 40, 41, 42]])
with torch.no_grad():
    logprobs = completion_logprobs(model, ids, torch.ones_like(ids), 2).logprobs
print(json.dumps({"tokens": decoded.tokens, "calls": steps, "logprobs": logprobs.tolist()}))
torch.distributed.destroy_process_group()
"""


def test_processes_call_the_model_equally_often_with_different_work(tiny_model_dir, tmp_path):
    model = load_causal_lm(str(tiny_model_dir), torch.float32)
    prompts = [[1, 40, 41, 42], [1, 90], [1, 17, 18]]
    options = {"seeds": [0, 1, 2], "max_new_tokens": 10, "temperature": 1.0, "pad_id": 1}
    stops = [decode(model, prompts, stop_ids=(), **options).tokens[0][3]]
    alone = decode(model, prompts, stop_ids=stops, **options).tokens
    command = [sys.executable, "-c", PROGRAM]
    arguments = [str(tiny_model_dir), str(tmp_path / "store"), json.dumps(stops)]
    ranks = [
        subprocess.Popen([*command, str(rank), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=100) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs[0][1] + outputs[1][1]
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first["tokens"] == alone and second["tokens"] == []
    assert first["calls"] == second["calls"] == max(map(len, alone))
    ids = torch.tensor([[1, 40, 41, 42]])
    with torch.no_grad():
        whole = model(ids).logits[0, 1:3].log_softmax(-1).gather(-1, ids[0, 2:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(first["logprobs"][0]), whole, atol=1e-4, rtol=1e-4)
