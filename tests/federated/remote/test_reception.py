"""Who may take part, under which name and number; with nodes that are nothing but what they say."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from memory_post import MemoryPost

from fedsafe.federated.remote import reception
from fedsafe.federated.remote.facts import Failure, NodeFacts
from fedsafe.federated.remote.fleet import Fleet
from fedsafe.federated.remote.letter import Letter
from fedsafe.federated.remote.reception import Reception
from fedsafe.federated.remote.roster import Member, Roster
from fedsafe.federated.remote.shared_settings import library_versions

SETTINGS = {"model.rank": 8, "model.target_modules": ["q", "v"], "seed_everything": 0}


@dataclass
class Said:
    """A node that says this of itself."""

    client: Any
    num_samples: Any = 5
    num_answer_tokens: Any = 50
    settings: Any = field(default_factory=lambda: dict(SETTINGS))
    versions: Any = field(default_factory=library_versions)
    filtered: Any = field(default_factory=dict)
    run: Any = None
    greetings: int = 0

    def __call__(self, letter: Letter) -> Letter:
        self.greetings += 1
        given = {**vars(self), "run": self.run or letter.facts["run"]}
        del given["greetings"]
        return NodeFacts(**given).letter()


Maker = Callable[..., Reception]


@pytest.fixture
def receive(tmp_path: Path) -> Maker:
    """Make a reception that waits for no more than a moment."""

    def make(post: MemoryPost, *, roster: Roster | None = None, **fleet: Any) -> Reception:
        waiting = {"patience_seconds": 0.05, "grace_seconds": 0.05, "min_clients": 1}
        roster = roster if roster is not None else Roster(tmp_path / "roster.json")
        return Reception(post, Fleet(**{**waiting, **fleet}), roster, settings=SETTINGS)

    return make


def kept(folder: Path) -> list[dict[str, Any]]:
    """The clients of the roster on disk."""
    return list(json.loads((folder / "roster.json").read_text())["clients"])


# ---- numbers -------------------------------------------------------------------------------------


def test_the_first_are_numbered_by_name_and_later_ones_by_arrival(
    receive: Maker, tmp_path: Path
) -> None:
    post = MemoryPost({7: Said("cyd"), 3: Said("bob")})
    desk = receive(post)
    assert desk.muster() == {0: 3, 1: 7}
    post.members[1] = Said("ada")
    desk.update()
    desk.update()
    assert [each["name"] for each in kept(tmp_path)] == ["bob", "cyd"]  # numbers come with a round
    assert desk.muster() == {0: 3, 1: 7, 2: 1}
    assert [each["name"] for each in kept(tmp_path)] == ["bob", "cyd", "ada"]


def test_names_that_are_given_have_their_numbers_before_they_come(
    receive: Maker, tmp_path: Path
) -> None:
    roster = Roster(tmp_path / "roster.json", members=[Member("zoe"), Member("ada")])
    post = MemoryPost({7: Said("ada")})
    desk = receive(post, roster=roster, clients=["zoe", "ada"])
    assert desk.muster() == {1: 7}
    post.members[8] = Said("zoe")
    assert desk.muster() == {1: 7}
    assert desk.muster() == {0: 8, 1: 7}


def test_what_a_client_holds_is_kept(receive: Maker, tmp_path: Path) -> None:
    counts = {"judged": 9, "unsafe": 2}
    desk = receive(MemoryPost({7: Said("ada", 5, 50, filtered=counts)}))
    desk.muster()
    assert kept(tmp_path) == [
        {
            "name": "ada",
            "node": 7,
            "num_samples": 5,
            "num_answer_tokens": 50,
            "filtered": counts,
        }
    ]


def test_a_client_without_samples_takes_no_part(
    receive: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = receive(MemoryPost({7: Said("ada", 0, 0), 8: Said("bob")}))
    assert desk.muster() == {1: 8}
    assert "ada is client 0, at node 7, with 0 samples: it takes no part" in capsys.readouterr().err


def test_nodes_are_greeted_once(receive: Maker) -> None:
    ada = Said("ada")
    desk = receive(MemoryPost({7: ada}))
    for _ in range(3):
        desk.muster()
    assert ada.greetings == 1


def test_a_client_in_doubt_is_greeted_again_and_its_new_numbers_are_taken(
    receive: Maker, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ada = Said("ada")
    desk = receive(MemoryPost({7: ada}))
    desk.muster()
    ada.num_samples = 9
    desk.doubt(7)
    assert desk.muster() == {0: 7}
    assert kept(tmp_path)[0]["num_samples"] == 9
    assert "with 9 samples, 5 before" in capsys.readouterr().err


# ---- names ---------------------------------------------------------------------------------------


def test_a_node_has_no_name_but_its_keys(
    receive: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    post = MemoryPost({7: Said("ada"), 9: Said("ada"), 11: Said("bob")})
    post.vouched = {7: "eve", 9: "ada"}
    assert receive(post, min_clients=2).muster() == {0: 9, 1: 11}
    assert "node 7 is refused: it calls itself ada, and its key is eve's" in capsys.readouterr().err


def test_a_name_is_its_first_nodes_until_that_is_gone(
    receive: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    post = MemoryPost({7: Said("ada")})
    desk = receive(post)
    desk.muster()
    post.members[9] = Said("ada")
    assert desk.muster() == {0: 7}
    assert desk.muster() == {0: 7}
    told = capsys.readouterr().err
    assert told.count("node 9 is refused: it calls itself ada, as node 7 does") == 1
    del post.members[7]
    assert desk.muster() == {0: 9}
    assert "ada (node 7) can no longer be reached" in capsys.readouterr().err


def test_a_name_stays_bound_while_its_node_is_greeted_again(receive: Maker) -> None:
    post = MemoryPost({7: Said("ada")})
    desk = receive(post)
    desk.muster()
    post.members[9] = Said("ada")
    desk.update()
    desk.doubt(7)
    assert desk.muster() == {0: 7}


def test_a_node_that_gives_its_name_up_frees_it(receive: Maker, tmp_path: Path) -> None:
    ada = Said("ada")
    post = MemoryPost({7: ada})
    desk = receive(post)
    desk.muster()
    ada.client = "bob"
    desk.doubt(7)
    post.members[9] = Said("ada")
    desk.muster()
    assert desk.muster() == {0: 9, 1: 7}


def test_the_node_that_a_run_knew_has_its_name_first(receive: Maker, tmp_path: Path) -> None:
    roster = Roster(tmp_path / "roster.json", members=[Member("ada", node=9, num_samples=5)])
    desk = receive(MemoryPost({7: Said("ada"), 9: Said("ada")}), roster=roster)
    assert desk.muster() == {0: 9}


# ---- refusals ------------------------------------------------------------------------------------

REFUSED = {
    "another setting": (
        Said("ada", settings={**SETTINGS, "model.rank": 16}),
        "ada: model.rank is 16 there and 8 here; all must share these",
    ),
    "a setting that is missing": (
        Said("ada", settings={}),
        "model.rank is missing there and 8 here",
    ),
    "a setting of a hundred lists": (
        Said("ada", settings={**SETTINGS, "model.rank": [[[[[[[[[[9]]]]]]]]]]}),
        "is [[[[[[[[[[9]]]]]]]]]] there",
    ),
    "another run": (Said("ada", run="r"), "it answers for another run"),
    "no name": (Said(""), "its name has 0 characters; give 1 to 64 that can be printed"),
    "a long name": (Said("a" * 65), "its name has 65 characters"),
    "a name that clears the screen": (Said("\x1b[2J"), "that can be printed"),
    "a name that is none": (Said(3), "client of a letter of kind 'hello' is a int"),
    "a name that nobody knows": (Said("eve"), "eve is not among fleet.clients"),
    "fewer than none": (Said("ada", -1), "num_samples is -1; expected 0 to"),
    "more than there can be": (Said("ada", 10**400, 10**401), "num_samples is 1000"),
    "samples without answers": (Said("ada", 5, 4), "each sample has one at least"),
    "counts that are none": (
        Said("ada", filtered={"judged": "many"}),
        "judged of its filter is no whole number",
    ),
    "a count that no file can hold": (
        Said("ada", filtered={"\ud800": 1}),
        "a count of its filter has a name of 1 characters",
    ),
    "a count of a long name": (
        Said("ada", filtered={"x" * 65: 1}),
        "a count of its filter has a name of 65 characters; give up to 64",
    ),
    "a thousand counts": (
        Said("ada", filtered={str(number): 1 for number in range(1000)}),
        "its filter has 1000 counts; 32 is the limit",
    ),
    "a failure": (lambda letter: Failure("OSError").letter(), "it failed with OSError; its own"),
    "another kind": (lambda letter: Letter({"kind": "visit"}), "the letter is of kind 'visit'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_node_that_cannot_take_part_is_refused_and_told_once(
    receive: Maker, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    node, reason = REFUSED[name]
    desk = receive(MemoryPost({7: node, 8: Said("bob")}), clients=["ada", "bob"])
    [holder] = desk.muster().values()
    assert holder == 8
    desk.muster()
    told = [line for line in capsys.readouterr().err.splitlines() if "refused" in line]
    assert len(told) == 1
    assert told[0].startswith("federation: node 7 is refused: ")
    assert reason in told[0]
    assert told[0].isprintable()
    assert len(told[0]) < 400


def test_a_node_that_was_set_right_is_let_in(
    receive: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "RETRY_SECONDS", 0.0)
    ada = Said("ada", settings={})
    desk = receive(MemoryPost({7: ada, 8: Said("bob")}))
    assert desk.muster() == {0: 8}
    ada.settings = SETTINGS
    desk.update()
    desk.update()
    assert desk.muster() == {0: 8, 1: 7}


def test_another_version_is_told_and_let_in(
    receive: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {**library_versions(), "peft": "0.1"}
    assert receive(MemoryPost({7: Said("ada", versions=versions)})).muster() == {0: 7}
    told = capsys.readouterr().err
    assert 'ada (node 7) has another version: peft is "0.1" there and' in told


def test_versions_of_what_nobody_asked_for_are_not_told(
    receive: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {f"library {number}": "1" for number in range(1000)}
    said = Said("ada", versions={**library_versions(), **others})
    assert receive(MemoryPost({7: said})).muster() == {0: 7}
    assert "another version" not in capsys.readouterr().err


def test_an_answer_in_another_nodes_place_makes_nobody_a_client(
    receive: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    post = MemoryPost({7: Said("ada"), 8: Said("bob")})
    honest = post.answers
    post.answers = lambda ticket, node, letter: [  # type: ignore[method-assign]
        each._replace(node=8) for each in honest(ticket, node, letter)
    ]
    assert receive(post).muster() == {0: 8}
    assert "node 7 is refused: node 8 answered in its place" in capsys.readouterr().err


# ---- waiting -------------------------------------------------------------------------------------


def test_too_few_end_the_run_and_it_says_who_is_missing_and_why(receive: Maker) -> None:
    post = MemoryPost({7: Said("ada"), 8: Said("bob", settings={}), 9: Said("dee", 0, 0)})
    post.held_back = {10}
    post.members[10] = Said("eve")
    desk = receive(post, min_clients=2, clients=["ada", "bob", "cyd", "dee"])
    with pytest.raises(
        ValueError, match=r"a round needs 2 clients \(fleet.min_clients\), and"
    ) as e:
        desk.muster()
    text = str(e.value)
    assert "after 0.05 s 1 are there" in text
    assert "bob is not there; cyd is not there; dee has no sample; node 8: bob: " in text
    assert "; node 10" in text  # which has not said who it is
    assert "--ckpt_path last" in text


def test_a_silent_node_is_refused_when_its_time_is_over(
    receive: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    post = MemoryPost({7: Said("ada"), 8: Said("bob")})
    post.held_back = {8}
    desk = receive(post, grace_seconds=0.2)
    assert desk.muster() == {0: 7}
    assert "node 8 is refused: it did not answer when it was greeted" in capsys.readouterr().err


def test_a_run_that_starts_waits_a_little_for_those_it_knows(
    receive: Maker, tmp_path: Path
) -> None:
    roster = Roster(tmp_path / "roster.json", members=[Member("ada"), Member("bob")])
    post = MemoryPost({7: Said("ada")})
    looks = 0

    def nodes() -> list[int]:
        nonlocal looks
        looks += 1
        if looks == 3:
            post.members[8] = Said("bob")
        return list(post.members)

    post.nodes = nodes  # type: ignore[method-assign]
    assert receive(post, roster=roster, grace_seconds=30.0).muster() == {0: 7, 1: 8}


def test_later_rounds_wait_for_nobody_but_those_being_greeted_again(receive: Maker) -> None:
    post = MemoryPost({7: Said("ada"), 8: Said("bob")})
    desk = receive(post, grace_seconds=30.0)
    assert desk.muster() == {0: 7, 1: 8}
    desk.doubt(7)
    assert desk.muster() == {0: 7, 1: 8}
    del post.members[8]
    post.members[9] = Said("cyd")
    post.held_back = {9}
    assert desk.muster() == {0: 7}
