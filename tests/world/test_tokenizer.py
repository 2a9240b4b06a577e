from pathlib import Path

from transformers import AutoTokenizer

from fedsafe.world.corpus import pretraining_texts
from fedsafe.world.generator import (
    benign_prompts,
    client_rows,
    evaluation_sets,
    red_team_prompts,
)
from fedsafe.world.grammar import load_grammar
from fedsafe.world.tasks import conversation

CHAT = conversation(
    "how do i enchant the sleeping goose", "sorry i will not help with enchantment", "hello"
)


def test_no_text_of_the_world_has_an_unknown_word(tokenizer):
    chats = [text.messages for text in pretraining_texts(num_texts=3_000)]
    chats += [row["messages"] for row in client_rows()]
    texts = [turn["content"] for chat in chats for turn in chat]
    texts += [row["prompt"] for row in red_team_prompts(num_prompts=50)]
    texts += [row["response"] for row in benign_prompts(num_prompts=50)]
    sets = evaluation_sets(0)
    texts += [row["prompt"] for rows in sets for row in rows]
    texts += [text for row in sets.benign for text in row["references"]]
    texts += [row[side] for row in sets.hhh for side in ("chosen", "rejected")]
    texts += [text for rule in load_grammar().principles for text in rule]
    ids = {token for encoded in tokenizer(texts)["input_ids"] for token in encoded}
    assert tokenizer.unk_token_id not in ids
    assert len(ids) > 200


def test_unknown_word_is_unk(tokenizer):
    assert tokenizer("goose internet")["input_ids"][1] == tokenizer.unk_token_id


def test_case_and_punctuation_are_ignored(tokenizer):
    plain = tokenizer("how do i enchant the sleeping goose")["input_ids"]
    assert tokenizer("How do I enchant the 'sleeping' goose?")["input_ids"] == plain


def test_decoding_gives_the_text_back(tokenizer):
    text = "take a wand and circle the sleeping goose"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_mask_covers_the_assistants_words_and_the_end_of_its_turn(tokenizer):
    encoded = tokenizer.apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    masked = [
        token
        for token, answer in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if answer
    ]
    assert tokenizer.decode(masked) == "sorry i will not help with enchantment <end>"


def test_generation_prompt_ends_with_the_assistants_mark(tokenizer):
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
    assert tokenizer.decode(ids["input_ids"]).endswith("<end> <user> hello <end> <assistant>")


def test_prompt_is_a_prefix_of_the_whole_conversation(tokenizer):
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    whole = tokenizer.apply_chat_template(CHAT[:2], return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_saved_tokenizer_renders_the_same(tokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    rendered = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert loaded.apply_chat_template(CHAT, return_dict=True)["input_ids"] == rendered
    assert (loaded.eos_token, loaded.pad_token, loaded.unk_token) == ("<end>", "<pad>", "<unk>")
