"""Models that FSDP2 splits over two ranks, each beside the same model whole on one.

    python -m torch.distributed.run --nproc_per_node=2 sharded_models.py FOLDER TINY_GPT2 TINY_LLAMA

leaves `FOLDER/rank<n>.pt`: by case, what was seen of the whole model and of the split one.
"""

import copy
import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

import fedsafe.model.module as module_file
from fedsafe.data.chat import ensure_chat_template
from fedsafe.data.packing import Pack, pack
from fedsafe.data.tokenizer import load_tokenizer
from fedsafe.model.adapter import adapter_scale, load_adapter, save_adapter
from fedsafe.model.compilation import compile_layers
from fedsafe.model.dialogues import Dialogues
from fedsafe.model.generation import generate_answers
from fedsafe.model.module import LoraLM
from fedsafe.model.sharded_adapter import ShardedAdapter
from fedsafe.model.sharded_load import decoder_layers
from fedsafe.strategies.layout import layout_of
from fedsafe.strategies.sharded import ShardedStrategy

_LLAMA = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
_GPT2 = {"vocab_size": 128, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
_TOP = ["q_proj", "lm_head", "embed_tokens"]

CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"base": "gpt2", "from_config": _GPT2},  # tied, Conv1D
    "llama": {"base": "llama", "from_config": _LLAMA},
    "llama_tied": {"base": "llama", "from_config": _LLAMA | {"tie_word_embeddings": True}},
    "llama_bfloat16": {"base": "llama", "from_config": _LLAMA, "dtype": "bfloat16"},
    "llama_recomputed": {"base": "llama", "from_config": _LLAMA, "gradient_checkpointing": True},
    "gpt2_recomputed": {"base": "gpt2", "from_config": _GPT2, "gradient_checkpointing": True},
    "llama_compiled": {
        "base": "llama",
        "from_config": _LLAMA | {"num_hidden_layers": 1},
        "compile": True,
    },
    "gpt2_folder": {"base": "TINY_GPT2"},
    "llama_folder": {"base": "TINY_LLAMA"},
    "odd_sizes": {"base": "llama", "from_config": _LLAMA | {"vocab_size": 131}, "rank": 1},
    "adapted_top": {"base": "llama", "from_config": _LLAMA, "target_modules": _TOP},
    "scaled_logits": {"base": "granite", "from_config": _LLAMA | {"logits_scaling": 4.0}},
    "sliding_window": {"base": "mistral", "from_config": _LLAMA | {"sliding_window": 4}},
}
"""Settings of `LoraLM`; capital letters stand for folders."""

Seen = dict[str, Any]


def module_of(case: str, folders: dict[str, str]) -> LoraLM:
    settings = {"rank": 4, "alpha": 8.0, "learning_rate": 1e-2} | CASES[case]
    settings["base"] = folders.get(settings["base"], settings["base"])
    return LoraLM(**settings)


def split(module: LoraLM, **strategy: Any) -> LoraLM:
    """Build the module as a Trainer would."""
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ShardedStrategy(**strategy),
        logger=False,
        enable_checkpointing=False,
    )
    module._trainer = trainer
    trainer.strategy.connect(module)
    trainer.strategy.setup_environment()
    module.configure_model()
    return module


def samples() -> Pack:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 100, size=n).astype(np.int32) for n in (11, 5, 17, 8)]
    return pack([(each, np.arange(len(each)) >= len(each) // 2) for each in ids])


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def see(module: LoraLM, tokenizer: Any) -> Seen:
    """What a model is and does."""
    model, packed = module.peft_model, samples()
    parameters = {name: whole(p).detach().clone() for name, p in module.named_parameters()}
    seen: Seen = {
        "parameters": parameters,
        "trained": [name for name, p in module.named_parameters() if p.requires_grad],
        "buffers": dict(module.named_buffers()),
    }
    adapter = module.flat_adapter()
    generator = torch.Generator().manual_seed(1)
    adapter.write(0.2 * torch.randn(adapter.num_params, generator=generator))
    seen["adapter"] = adapter.read()
    torch.manual_seed(0)  # GPT-2 has dropout
    nll = module(packed)
    nll.sum().backward()
    seen |= {"nll": nll.detach(), "gradient": adapter.read_gradient()}
    if module.hparams["compile"]:  # every other kind of call takes seconds to trace
        return seen
    seen["logprobs"] = module.answer_logprobs(packed)
    with adapter_scale(model, 0):
        seen["logprobs_of_the_base"] = module.answer_logprobs(packed)
    with adapter_scale(model, 0.5):
        seen["logprobs_at_half"] = module.answer_logprobs(packed)
    torch.manual_seed(0)
    with torch.no_grad():
        seen["logits"] = model(**module._inputs(packed)).logits
    return seen | spoken(module, tokenizer) | trained(module)


def spoken(module: LoraLM, tokenizer: Any) -> Seen:
    """Answers, likeliest and sampled, and a second turn that goes on from the first."""
    model = module.peft_model
    asked = [[{"role": "user", "content": text}] for text in ("hi", "what is it?", "sun and moon")]
    greedy, sampled = (
        generate_answers(model, tokenizer, asked, max_new_tokens=6, temperature=temperature)
        for temperature in (0.0, 1.0)
    )
    dialogues = Dialogues(model, tokenizer)
    first = dialogues.answer(asked, max_new_tokens=4, seeds=[1, 2, 3], temperature=1.0)
    grown = [
        [*each, {"role": "assistant", "content": said.text}, {"role": "user", "content": "and?"}]
        for each, said in zip(asked, first, strict=True)
        if said is not None
    ]
    second = dialogues.answer(grown, max_new_tokens=4, seeds=[4, 5, 6], temperature=1.0)
    return {"greedy": greedy, "sampled": sampled, "first": first, "second": second}


def trained(module: LoraLM) -> Seen:
    """Two optimizer steps, and what the optimizer remembers, twice as large the second time."""
    adapter, optimizer = module.flat_adapter(), module.configure_optimizers()
    for group in optimizer.param_groups:
        group["foreach"] = isinstance(adapter, ShardedAdapter)  # as ShardedStrategy has it
    for factor in (1.0, 2.0):
        adapter.write_gradient(factor * adapter.read_gradient())
        optimizer.step()
    seen: Seen = {"moments": adapter.optimizer_state(optimizer), "stepped": adapter.read()}
    adapter.forget(optimizer)
    seen["forgotten"] = adapter.optimizer_state(optimizer)
    adapter.load_optimizer_state(optimizer, copy.deepcopy(seen["moments"]))
    optimizer.step()
    return seen | {"moments_later": adapter.optimizer_state(optimizer), "later": adapter.read()}


def most_layers_at_once(module: LoraLM) -> int:
    """Decoder layers that are whole on this rank while one of them is at work, at most."""
    layers = decoder_layers(module.peft_model)
    counts = []

    def count(*_: Any) -> None:
        first = [next(layer.parameters()) for layer in layers]
        counts.append(sum(not isinstance(parameter, DTensor) for parameter in first))

    handles = [layer.register_forward_hook(count, prepend=True) for layer in layers]
    with torch.no_grad():
        module(samples())
    for handle in handles:
        handle.remove()
    return max(counts)


def held(module: LoraLM) -> dict[str, int]:
    """Numbers of a model's parameters that are on this rank, and in all."""
    mine = sum(p.to_local().numel() for p in module.parameters() if isinstance(p, DTensor))
    return {"mine": mine, "all": sum(p.numel() for p in module.parameters())}


def reloaded(module: LoraLM, folder: Path) -> bool:
    """Whether an adapter is what it was, written to files and read back into other values."""
    adapter = module.flat_adapter()
    before = adapter.read()
    save_adapter(module.peft_model, folder, tensors=adapter.named_views(before))
    adapter.write(torch.zeros_like(before))
    load_adapter(module.peft_model, folder, access=adapter)
    return torch.equal(adapter.read(), before)


def seconds_waited(module: LoraLM) -> float:
    """How long the ranks of a group wait for one another."""
    group: Any = layout_of(module.trainer.strategy).data.group
    return float(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())


def refusal(settings: dict[str, Any], **strategy: Any) -> str:
    try:
        split(LoraLM(**settings), **strategy)
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path, tiny_gpt2: str, tiny_llama: str) -> None:
    folders = {"TINY_GPT2": tiny_gpt2, "TINY_LLAMA": tiny_llama}
    module_file.compile_layers = partial(compile_layers, backend="eager")  # without a compiler
    tokenizer = load_tokenizer(tiny_gpt2)
    ensure_chat_template(tokenizer)
    found: dict[str, Any] = {}
    for case in CASES:
        alone, parted = module_of(case, folders), module_of(case, folders)
        alone.configure_model()
        if os.environ["RANK"] != "0":  # it has no files of the base
            parted.make_base = None  # type: ignore[assignment]
        split(parted)
        found[case] = {"held": held(parted), "layers": most_layers_at_once(parted)}
        found[case] |= {"whole": see(alone, tokenizer), "split": see(parted, tokenizer)}
        found[case]["held_later"] = held(parted)
        found[case]["compiled"] = any(m._compiled_call_impl for m in parted.modules())
        if case == "llama_folder":
            found["reloaded"] = reloaded(parted, folder / f"adapter{dist.get_rank()}")
    llama = CASES["llama"]
    found["refusals"] = {
        "clients": refusal(llama, clients=3),
        "base": refusal({"base": "no/such/folder"}),
        "4bit": refusal({"base": tiny_llama, "quantize_4bit": True}),
    }
    patient = LoraLM(**llama)
    found["waited"] = seconds_waited(split(patient, timeout=timedelta(hours=2)))
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:4])
