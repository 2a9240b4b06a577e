from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedsafe.model import lora
from fedsafe.model.adapter import save_adapter
from fedsafe.model.lora import adaptable_module_names, add_lora, load_base

LLAMA = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1}
LORA: dict[str, Any] = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": "all-linear"}


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = state(first), state(second)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_base_is_loaded_from_its_folder(tiny_llama: Path) -> None:
    loaded = load_base(str(tiny_llama), dtype=torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert same(loaded, reference)


def test_a_random_base_depends_on_the_seed_alone_and_draws_from_nothing_else() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = load_base("llama", from_config=LLAMA, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert same(first, load_base("llama", from_config=LLAMA, seed=1))
    assert not same(first, load_base("llama", from_config=LLAMA, seed=2))


def test_a_fresh_adapter_depends_on_the_seed_alone_and_changes_no_output() -> None:
    base = load_base("llama", from_config=LLAMA)
    ids = torch.tensor([[3, 4, 5]])
    expected = base(ids).logits
    before = torch.random.get_rng_state()
    adapted = add_lora(base, **LORA, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(adapted(ids).logits, expected)
    again = add_lora(load_base("llama", from_config=LLAMA), **LORA, seed=3)
    other = add_lora(load_base("llama", from_config=LLAMA), **LORA, seed=4)
    assert same(adapted, again)
    assert not same(adapted, other)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_all_linear_reaches_every_linear_module_but_the_output_layer(
    family: str, tiny_gpt2: Path, tiny_llama: Path
) -> None:
    base = load_base(str({"gpt2": tiny_gpt2, "llama": tiny_llama}[family]))
    others = {"lm_head", "embed_tokens", "wte", "wpe"}
    expected = set(adaptable_module_names(base)) - others
    adapted = add_lora(base, **LORA)
    reached = {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n in state(adapted) if ".lora_A" in n}
    assert reached == expected
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_modules_can_be_named_by_their_ending() -> None:
    adapted = add_lora(
        load_base("llama", from_config=LLAMA),
        **LORA | {"target_modules": ["0.self_attn.q_proj", "v_proj"]},
    )
    reached = {name.split(".lora_A")[0] for name in state(adapted) if ".lora_A" in name}
    assert {".".join(name.split(".")[-3:]) for name in reached} == {
        "0.self_attn.q_proj",
        "0.self_attn.v_proj",
        "1.self_attn.v_proj",
    }


def test_an_adapter_on_the_embeddings_changes_the_output_and_loads_again(tmp_path: Path) -> None:
    base = load_base("llama", from_config=LLAMA)
    adapted = add_lora(base, **LORA | {"target_modules": ["embed_tokens", "v_proj"]}).eval()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        untrained = adapted(ids).logits
        for name, parameter in adapted.named_parameters():
            if "lora_embedding" in name:
                parameter.normal_(std=0.3)
        trained = adapted(ids).logits
        save_adapter(adapted, tmp_path)
        again = load_base("llama", from_config=LLAMA)
        loaded = PeftModel.from_pretrained(again, tmp_path).eval()
        torch.testing.assert_close(loaded(ids).logits, trained)
        torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, trained)
    assert (trained - untrained).abs().max() > 1e-3


def test_embeddings_that_are_the_output_layer_too_are_refused(tiny_gpt2: Path) -> None:
    with pytest.raises(ValueError, match="target_modules has wte, whose weights are those of the "):
        add_lora(load_base(str(tiny_gpt2)), **LORA | {"target_modules": ["c_attn", "wte"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank of the adapter is 0; give 1 or more"),
        (
            {"target_modules": ["q_proj", "c_attn"]},
            r"\['c_attn'\] are not in LlamaForCausalLM; it has down_proj, embed_tokens, gate_p",
        ),
        ({"target_modules": []}, r"target_modules \[\] are not in .*; it has down_proj"),
        ({"target_modules": "q_proj"}, "target_modules is 'q_proj'; give a list of names or 'all-"),
    ],
)
def test_an_adapter_that_cannot_be_made_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(load_base("llama", from_config=LLAMA), **LORA | settings)


def test_an_unknown_base_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no base model at .*nowhere.*give the name of a causal"):
        load_base(str(tmp_path / "nowhere"))


def test_an_unknown_model_type_is_named() -> None:
    with pytest.raises(ValueError, match=r"'lama' is not a model type of transformers; .*'llama'"):
        load_base("lama", from_config=LLAMA)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("llama", "hiden_size", r"has hiden_size, which no llama has; did you mean hidden_size"),
        ("gpt2", "n_emb", r"has n_emb, which no gpt2 has; did you mean n_embd"),
        ("llama", "xyz", r"has xyz, which no llama has; leave it out"),
    ],
)
def test_a_misspelt_name_of_a_random_base_is_refused(family: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_base(family, from_config={name: 64})


def test_both_names_of_a_size_are_known() -> None:
    small = {"vocab_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "n_positions": 8}
    for size in ("n_embd", "hidden_size"):
        assert load_base("gpt2", from_config={**small, size: 16}).config.n_embd == 16
    rotary = load_base("llama", from_config=LLAMA | {"rope_theta": 77.0}).config
    assert rotary.rope_parameters["rope_theta"] == 77.0


def test_a_random_base_ends_with_no_token_unless_it_is_told_to() -> None:
    assert load_base("llama", from_config=LLAMA).generation_config.eos_token_id is None
    told = load_base("llama", from_config=LLAMA | {"eos_token_id": 5})
    assert told.generation_config.eos_token_id == 5


def test_a_model_that_cannot_take_packed_attention_is_refused() -> None:
    config = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    with pytest.raises(ValueError, match="'gptj' has no attention 'fedsafe_packed'; choose anoth"):
        load_base("gptj", from_config=config, attention="fedsafe_packed")


def test_four_bits_without_bitsandbytes_are_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes; pip install 'fedsafe\[quantizati"):
        load_base(str(tiny_llama), quantize_4bit=True)


def test_four_bits_without_a_gpu_are_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device and none is visible"):
        load_base(str(tiny_llama), quantize_4bit=True)


def test_four_bits_of_a_random_base_are_refused() -> None:
    with pytest.raises(ValueError, match="quantize_4bit loads trained weights"):
        load_base("llama", from_config=LLAMA, quantize_4bit=True)


@pytest.mark.parametrize("values", [{"hidden_size": "wide"}, {"hidden_size": 30}])
def test_a_value_that_makes_no_model_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="from_config does not make a llama: "):
        load_base("llama", from_config={"num_attention_heads": 4, **values})
