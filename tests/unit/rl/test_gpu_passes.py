"""The estimate of activations is that of counted ones."""

import pytest
from transformers import LlamaConfig

from align.rl.gpu_passes import activation_bytes


@pytest.mark.parametrize(("hidden", "inner", "layers", "counted"), [(4096, 14336, 32, 6.8e6), (2048, 8192, 16, 1.85e6)])
def test_a_position_takes_what_hooks_on_saved_tensors_counted(hidden, inner, layers, counted) -> None:
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers)
    assert activation_bytes(config, 1) == pytest.approx(counted, rel=0.05)
    assert activation_bytes(config, 100) == 100 * activation_bytes(config, 1)
