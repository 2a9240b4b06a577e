"""The miniature world's tokenizer: one token a word, about 260 of them."""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedsafe.world.grammar import GRAMMAR_DIR, load_grammar

SPECIAL_TOKENS = ("<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>")
GUARD_WORDS = ("safe", "unsafe")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer: lower case, punctuation ignored, every word of the grammar known.

    Its chat template marks the assistant's words and the end of their turn, so that
    `apply_chat_template(..., return_assistant_tokens_mask=True)` gives the tokens to train on.
    """
    codes = [f"s{index}" for index in range(1, len(load_grammar().categories) + 1)]
    words = sorted({*load_grammar().words(), *GUARD_WORDS, *codes})
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[.,;:!?'\"]"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        chat_template=(GRAMMAR_DIR / "chat_template.jinja").read_text(encoding="utf-8").strip(),
        clean_up_tokenization_spaces=False,
    )
