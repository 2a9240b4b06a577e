"""Tiny random models of several families, and packed samples of random tokens."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedsafe.data.packing import Pack, pack
from fedsafe.model.module import LoraLM

VOCABULARY = 64
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # far enough from zero that every token matters
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE | {"sliding_window": 4},
    "gemma2": _LLAMA_LIKE | {"head_dim": 8, "final_logit_softcapping": 5.0},
    "granite": _LLAMA_LIKE | {"logits_scaling": 4.0},
    "cohere": _LLAMA_LIKE | {"logit_scale": 0.25},
    "phi": _LLAMA_LIKE,  # its output layer has a bias
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "gpt_neo": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
}


@pytest.fixture
def make_module() -> Callable[..., LoraLM]:
    """Make a `LoraLM` of a family, its adapter set to values that change the output."""

    def make(family: str, **settings: Any) -> LoraLM:
        module = LoraLM(
            family, from_config=SHAPES[family], **({"rank": 4, "alpha": 8.0} | settings)
        )
        module.configure_model()
        adapter = module.flat_adapter()
        generator = torch.Generator().manual_seed(1)
        adapter.write(0.2 * torch.randn(adapter.num_params, generator=generator))
        return module

    return make


Samples = list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def samples() -> Samples:
    """Token ids and answer masks of four samples; one has two answers, one begins with one."""
    rng = np.random.default_rng(0)
    lengths = (11, 5, 17, 8)
    ids = [rng.integers(3, VOCABULARY, size=n).astype(np.int32) for n in lengths]
    masks = [np.arange(n) >= n // 2 for n in lengths]
    masks[2][3:6] = True
    masks[3][0] = True
    return list(zip(ids, masks, strict=True))


@pytest.fixture
def packed(samples: Samples) -> Pack:
    return pack(samples)


@pytest.fixture
def make_model() -> Callable[[str], PreTrainedModel]:
    """Make a random base of a family, in evaluation mode, that ends nothing by itself."""

    def make(family: str, **settings: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(SHAPES[family] | settings))
        model = AutoModelForCausalLM.from_config(config).eval()
        model.generation_config.eos_token_id = None
        return model

    return make
