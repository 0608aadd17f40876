"""The reserved cache: new tokens copy no earlier states."""

import torch

from align.decoding.cache import ReservedLayer, reserved_cache
from align.models.loading import load_causal_lm


def test_cache_writes_in_place(tiny_model_dir):
    model = load_causal_lm(str(tiny_model_dir), torch.float32)
    cache = reserved_cache(model.config, 10)
    assert all(isinstance(layer, ReservedLayer) for layer in cache.layers)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache, use_cache=True)
        place = cache.layers[0].keys.data_ptr()
        model(torch.tensor([[4]]), past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.data_ptr() == place
    assert cache.get_seq_length() == 4
