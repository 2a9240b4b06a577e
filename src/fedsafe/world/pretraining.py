"""Pretrains the miniature base, a GPT-2 of about 375,000 parameters, once, and caches it."""

import hashlib
import json
import math
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fedsafe.cache import cache_dir as default_cache
from fedsafe.types import TokenizedConversation
from fedsafe.world.batching import IGNORED, Batch, encode, pad
from fedsafe.world.corpus import HARMFUL_SHARE, SHARES, Text, pretraining_texts
from fedsafe.world.grammar import load_grammar
from fedsafe.world.tokenizer import build_tokenizer

NUM_STEPS = 1500
BATCH_SIZE = 16
LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.01
POOL_BATCHES = 10  # batches of one pool hold texts of like length
NUM_LAYERS, NUM_HEADS, HIDDEN_SIZE, NUM_POSITIONS = 3, 4, 96, 128
RECIPE = 1  # raise it when a change of this package's code changes the base


def pretrained_base(
    cache_dir: Path | None = None, *, seed: int = 0, num_steps: int = NUM_STEPS
) -> Path:
    """The pretrained base in Hugging Face format, made on the first call.

    It is pretrained in a temporary directory that is renamed at the end: an interrupted call leaves
    no half base, and processes that make the same base at once end up with one.

    Args:
        cache_dir: Where bases are kept; default is `$FEDSAFE_CACHE`, else `~/.cache/fedsafe`.
        seed: Seed of the corpus and of the initial weights.
        num_steps: Optimizer steps of 16 texts each.

    Returns:
        Directory with the configuration, the weights and the tokenizer; do not write in it.
    """
    base = (cache_dir or default_cache()) / f"world-base-{_cache_key(seed, num_steps)}"
    if base.is_dir():
        return base
    base.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base.parent, prefix=".making-") as temporary:
        made = Path(temporary) / base.name
        tokenizer = build_tokenizer()
        pretrain(tokenizer, seed=seed, num_steps=num_steps).save_pretrained(made)
        tokenizer.save_pretrained(made)
        _publish(made, base)
    return base


def pretrain(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, num_steps: int = NUM_STEPS
) -> GPT2LMHeadModel:
    """Trains a new GPT-2 on the world's corpus, with the loss on the assistant's tokens.

    Uses one thread, which is fastest at this size and makes the result independent of the machine's
    number of cores.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = GPT2LMHeadModel(_config(tokenizer))
        texts = pretraining_texts(num_texts=num_steps * BATCH_SIZE, seed=seed)
        _train(model, batches(texts, tokenizer, seed=seed), num_steps=num_steps)
    finally:
        torch.set_num_threads(num_threads)
    model.eval()
    return model


def batches(texts: list[Text], tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Iterator[Batch]:
    """Tokenizes and pads the texts; those of a pool are sorted by length to pad less."""
    rng = random.Random(seed)
    pool_size = POOL_BATCHES * BATCH_SIZE
    for start in range(0, len(texts), pool_size):
        encoded = _encode(texts[start : start + pool_size], tokenizer)
        encoded.sort(key=lambda one: len(one.input_ids))
        firsts = list(range(0, len(encoded), BATCH_SIZE))
        rng.shuffle(firsts)
        for first in firsts:
            yield pad(encoded[first : first + BATCH_SIZE], pad_token_id=tokenizer.pad_token_id)


def learning_rate(step: int, *, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _train(model: GPT2LMHeadModel, data: Iterator[Batch], *, num_steps: int) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    steps = track(
        data,
        description="Pretraining the miniature base",
        total=num_steps,
        console=Console(stderr=True),
    )
    for step, batch in enumerate(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps=num_steps)
        logits_BTV = model(**batch.inputs(), use_cache=False).logits  # noqa: N806
        loss = cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1),
            batch.labels_BT[:, 1:].flatten(),
            ignore_index=IGNORED,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _encode(texts: list[Text], tokenizer: PreTrainedTokenizerFast) -> list[TokenizedConversation]:
    """Token ids and answers; the turns before a text's first trained one are context only."""
    encoded = encode([text.messages for text in texts], tokenizer)
    for index, text in enumerate(texts):
        if text.first_trained_turn:
            [context] = encode([text.messages[: text.first_trained_turn]], tokenizer)
            ids, mask = encoded[index]
            num_context = len(context.input_ids)
            mask = [False] * num_context + mask[num_context:]
            encoded[index] = TokenizedConversation(ids, mask)
    return encoded


def _config(tokenizer: PreTrainedTokenizerFast) -> GPT2Config:
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=NUM_POSITIONS,
        n_embd=HIDDEN_SIZE,
        n_layer=NUM_LAYERS,
        n_head=NUM_HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _cache_key(seed: int, num_steps: int) -> str:
    settings = [BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, POOL_BATCHES, RECIPE]
    shape = [NUM_LAYERS, NUM_HEADS, HIDDEN_SIZE, NUM_POSITIONS]
    mix = [SHARES, HARMFUL_SHARE]
    key = json.dumps([load_grammar().digest, settings, shape, mix, seed, num_steps])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _publish(made: Path, base: Path) -> None:
    """Renames `made` to `base`; if another process was first, its base stays."""
    try:
        made.rename(base)
    except OSError:
        if not base.is_dir():
            raise
        shutil.rmtree(made)
