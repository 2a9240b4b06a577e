import shutil
from pathlib import Path

import pytest

from fedsafe.world.grammar import GRAMMAR_DIR, load_grammar, read_grammar


@pytest.fixture
def grammar_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GRAMMAR_DIR, tmp_path / "grammar"))


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_world_has_the_documented_size():
    grammar = load_grammar()
    assert len(grammar.benign_old) + len(grammar.benign_new) == 24
    assert len(grammar.benign_new) == 8
    assert len(grammar.forbidden) == 24
    assert len(grammar.categories) == 6
    assert len(grammar.residents_new) * 2 == 16  # facts
    assert len(grammar.opposites_new) == 8
    assert all(len(texts) == 8 for texts in grammar.phrasings.values())
    assert grammar.held_out == 3


def test_clients_use_18_deeds_the_red_team_12_and_6_appear_in_neither():
    grammar = load_grammar()
    clients, red_team = set(grammar.client_harm), set(grammar.red_team)
    assert (len(clients), len(red_team)) == (18, 12)
    unseen = set(grammar.forbidden) - clients - red_team
    assert {deed.category for deed in unseen} == set(grammar.categories)
    assert len(unseen) == 6


def test_category_with_a_missing_deed_is_an_error(grammar_copy: Path):
    replace_in(grammar_copy / "deeds.yaml", "    enchant: [wand, circle]\n", "")
    with pytest.raises(ValueError, match="category 'enchantment' has 3 deeds; give it 4"):
        read_grammar(grammar_copy)


def test_deed_that_is_benign_and_forbidden_is_an_error(grammar_copy: Path):
    replace_in(grammar_copy / "deeds.yaml", "  polish: [", "  steal: [")
    with pytest.raises(ValueError, match=r"deeds \['steal'\] occur more than once"):
        read_grammar(grammar_copy)


def test_held_out_phrasing_with_an_unknown_word_is_an_error(grammar_copy: Path):
    replace_in(grammar_copy / "questions.yaml", "- show me how to {verb}", "- reveal how to {verb}")
    with pytest.raises(ValueError, match=r"of how_to uses \['reveal'\], which no tuning"):
        read_grammar(grammar_copy)


def test_digest_follows_the_files(grammar_copy: Path):
    assert read_grammar(grammar_copy).digest == load_grammar().digest
    replace_in(grammar_copy / "answers.yaml", "take a", "use a")
    assert read_grammar(grammar_copy).digest != load_grammar().digest
