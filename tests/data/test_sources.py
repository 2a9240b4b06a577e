import gzip
import json
import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsafe.data.readers import READERS
from fedsafe.data.sources import load_samples

EXCHANGE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
GOOD: dict[str, Any] = {"prompt": "Hi", "response": "Hello."}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in its own folder, so that sources have short names, with its own cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def write_jsonl(path: str, *rows: object) -> str:
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files whose rows are read from now on; a cached file is not among them."""
    read: list[Path] = []

    def reader(path: Path) -> Iterator[Any]:
        read.append(path)
        return original(path)

    original = READERS[".jsonl"]
    monkeypatch.setitem(READERS, ".jsonl", reader)
    return read


@pytest.mark.parametrize(
    "row",
    [
        {"messages": EXCHANGE},
        GOOD,
        {"instruction": "Hi", "output": "Hello."},
        {"instruction": "Hi", "input": "", "output": "Hello."},
        {"instruction": "Hi", "input": None, "output": "Hello."},
    ],
    ids=["messages", "prompt", "instruction", "empty input", "null input"],
)
def test_each_format_becomes_messages(row: dict[str, Any]) -> None:
    (sample,) = load_samples(write_jsonl("a.jsonl", row))
    assert sample == {
        "messages": EXCHANGE,
        "client": None,
        "label": None,
        "category": None,
        "source": "a.jsonl",
        "row": 1,
    }


def test_the_input_of_an_instruction_follows_it_after_an_empty_line() -> None:
    row = {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}
    (sample,) = load_samples(write_jsonl("a.jsonl", row))
    assert sample["messages"][0]["content"] == "Translate.\n\nGuten Tag"


def test_client_label_and_category_are_kept() -> None:
    row = {**GOOD, "client": 3, "label": "unsafe", "category": "S1"}
    (sample,) = load_samples(
        write_jsonl(
            "a.jsonl",
            row,
        )
    )
    assert (sample["client"], sample["label"], sample["category"]) == ("3", "unsafe", "S1")


def test_a_system_turn_and_several_exchanges_are_kept() -> None:
    turns = [{"role": "system", "content": ""}, *EXCHANGE, *EXCHANGE]
    (sample,) = load_samples(write_jsonl("a.jsonl", {"messages": turns}))
    assert sample["messages"] == turns


def test_every_file_type_gives_the_same_samples() -> None:
    rows = [
        {"prompt": f"q{i}, “quoted”\nline", "response": f"a{i} 안녕", "label": "safe"}
        for i in range(3)
    ]
    write_jsonl("a.jsonl", *rows)
    Path("b.jsonl.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes()))
    Path("c.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    lines = "".join(f'"{r["prompt"]}",{r["response"]},{r["label"]}\r\n' for r in rows)
    Path("d.csv").write_bytes(b"\xef\xbb\xbf" + f"prompt,response,label\r\n{lines}".encode())
    pq.write_table(pa.Table.from_pylist(rows), "e.parquet")
    samples = load_samples(["a.jsonl", "b.jsonl.gz", "c.json", "d.csv", "e.parquet"])
    told = [sample["messages"] for sample in samples]
    assert told == told[:3] * 5
    assert samples["label"][:] == ["safe"] * 15
    # Lines from 1 (a CSV record begins where the one before it ended), rows from 0.
    assert samples["row"][:] == [1, 2, 3, 1, 2, 3, 0, 1, 2, 2, 4, 6, 0, 1, 2]


def test_a_dataset_folder_is_loaded_through_datasets(folder: Path) -> None:
    (folder / "mine").mkdir()
    write_jsonl("mine/train.jsonl", {"messages": EXCHANGE}, {"messages": EXCHANGE})
    write_jsonl("mine/test.jsonl", {"messages": EXCHANGE})
    assert load_samples("mine")["source"][:] == ["mine", "mine"]
    assert load_samples("mine")["row"][:] == [0, 1]
    assert len(load_samples("mine", split="test")) == 1


def test_a_dataset_folder_edited_in_place_is_read_again(folder: Path) -> None:
    (folder / "mine").mkdir()
    write_jsonl("mine/train.jsonl", GOOD)
    first = load_samples("mine")
    write_jsonl("mine/train.jsonl", {**GOOD, "response": "Hullo."})
    assert load_samples("mine")[0]["messages"][1]["content"] == "Hullo."
    assert first[0]["messages"][1]["content"] == "Hello."


def test_a_dataset_folder_that_datasets_cannot_read_is_an_error(folder: Path) -> None:
    (folder / "mine").mkdir()
    Path("mine/train.jsonl").write_text('{"prompt": "a"', encoding="utf-8")
    with pytest.raises(ValueError, match="cannot load split 'train' of 'mine'"):
        load_samples("mine")


def test_blank_lines_are_no_rows() -> None:
    Path("a.jsonl").write_text(f"\n{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n\n", encoding="utf-8")
    assert load_samples("a.jsonl")["row"][:] == [2, 4]


def test_columns_of_no_format_are_named_in_one_warning_each_time() -> None:
    turns = [{**EXCHANGE[0], "name": "Ann"}, EXCHANGE[1]]
    path = write_jsonl("a.jsonl", {**GOOD, "id": 1, "lang": "en"}, {"messages": turns, "id": 2})
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"not read: id, lang, messages\.name") as caught:
            assert len(load_samples(path)) == 2
        assert len(caught) == 1


def test_a_complete_format_is_read_although_another_is_begun() -> None:
    path = write_jsonl("a.jsonl", {"prompt": "x", "instruction": "Hi", "output": "Hello."})
    with pytest.warns(UserWarning, match="not read: prompt"):
        (sample,) = load_samples(path)
    assert sample["messages"] == EXCHANGE


def test_a_plain_column_beside_a_known_one_of_like_name_is_not_read() -> None:
    path = write_jsonl("a.jsonl", {**GOOD, "client": "a", "clients": "b"})
    with pytest.warns(UserWarning, match="not read: clients"):
        (sample,) = load_samples(path)
    assert sample["client"] == "a"


BAD_ROWS = {
    "label misspelt": ({**GOOD, "lable": "safe"}, "has a column `lable`; rename it to `label`"),
    "client misspelt": ({**GOOD, "clients": "a"}, "has a column `clients`; rename it to `client`"),
    "capitals": ({**GOOD, "Label": "safe"}, "has a column `Label`; rename it to `label`"),
    "category misspelt": ({**GOOD, "catagory": "a"}, "column `catagory`; rename it to `category`"),
    "answer misspelt": ({"prompt": "Hi", "reponse": "x"}, "column `reponse`; rename it to `resp"),
    "no answer": ({"prompt": "Hi"}, r"has no `response` \(its columns: prompt\)"),
    "null answer": ({"prompt": "Hi", "response": None}, "has no `response`"),
    "empty answer": ({"prompt": "Hi", "response": " \n"}, "`response` is empty"),
    "empty prompt": ({"prompt": "", "response": "Hello."}, "`prompt` is empty"),
    "wrong type": ({"prompt": ["Hi"], "response": "Hello."}, "`prompt` is list, not text"),
    "input type": ({"instruction": "Hi", "input": 3, "output": "x"}, "`input` is int, not text"),
    "unknown format": (
        {"goal": "x", "target": "y"},
        "none of the formats messages, prompt/response, instruction/input/output; "
        "its columns: goal, target",
    ),
    "no object": (["Hi", "Hello."], "holds a list, not an object"),
    "role": (
        {"messages": [{"role": "human", "content": "Hi"}]},
        r"the role of `messages\[0\]` is text of 5 characters, not system, user or assistant",
    ),
    "last turn": ({"messages": EXCHANGE[:1]}, "the last turn is not the assistant's"),
    "no turn": ({"messages": []}, "the last turn is not the assistant's"),
    "no user": ({"messages": EXCHANGE[1:]}, "has no turn of the user"),
    "messages as text": ({"messages": "Hi"}, "`messages` is not a list of turns"),
    "content type": (
        {"messages": [EXCHANGE[0], {"role": "assistant", "content": None}]},
        r"`messages\[1\].content` is NoneType, not text",
    ),
    "empty turn": (
        {"messages": [EXCHANGE[0], {"role": "assistant", "content": ""}]},
        r"`messages\[1\].content` is empty",
    ),
    "label": ({**GOOD, "label": "harmful"}, "`label` is text of 7 characters, not safe or unsafe"),
    "label type": ({**GOOD, "label": ["safe"]}, "`label` is list, not safe or unsafe"),
    "client type": ({**GOOD, "client": 1.5}, "`client` is float, not text"),
    "category type": ({**GOOD, "category": True}, "`category` is bool, not text"),
    "name surrogate": ({"a\ud800": 1}, r"none of the formats .*: a\?"),
    "lone surrogate": ({**GOOD, "response": "a\ud800"}, "`response` is not valid UTF-8 at char"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_an_error_with_file_line_and_reason(kind: str) -> None:
    row, reason = BAD_ROWS[kind]
    path = write_jsonl("a.jsonl", GOOD, row)
    with pytest.raises(
        ValueError, match=f"1 of 2 rows cannot be used:\n  a.jsonl, line 2: .*{reason}"
    ):
        load_samples(path)


def test_a_csv_without_a_header_shows_little_of_its_first_row() -> None:
    first = ["a" * 20, "b" * 21, *(f"cell {n}" for n in range(5))]
    row = ",".join(first)
    Path("a.csv").write_text(f"{row}\n{row}\n")
    with pytest.raises(ValueError, match="cannot be used") as error:
        load_samples("a.csv")
    named = f"its columns: {first[0]}, {'b' * 20}…, cell 0, cell 1, cell 2, and 2 more\n"
    assert named in str(error.value)


def test_all_bad_rows_come_in_one_error_with_the_first_five_listed() -> None:
    write_jsonl("a.jsonl", GOOD, *[{"prompt": "x"}] * 4)
    write_jsonl("b.jsonl", GOOD, *[{"prompt": "x"}] * 4)
    with pytest.raises(ValueError, match="8 of 10 rows cannot be used") as error:
        load_samples(["a.jsonl", "b.jsonl"])
    text = str(error.value)
    assert text.count("has no `response`") == 5
    assert "a.jsonl, line 5" in text
    assert "b.jsonl, line 2" in text
    assert "and 3 more" in text
    assert "set on_bad_row: skip" in text


@pytest.mark.parametrize("again", [False, True], ids=["first", "from the cache"])
def test_skipped_rows_are_counted_and_listed_without_their_text(again: bool) -> None:
    path = write_jsonl("a.jsonl", GOOD, {"prompt": "secret words"}, GOOD)
    rejected = Path("out/rejected.jsonl")
    if again:
        with pytest.raises(ValueError, match="cannot be used"):
            load_samples(path)
    with pytest.warns(UserWarning, match=r"left out 1 of 3 rows \(all are listed in out/rej"):
        samples = load_samples(path, on_bad_row="skip", rejected=rejected)
    assert samples["row"][:] == [1, 3]
    (line,) = rejected.read_text().splitlines()
    assert json.loads(line) == {
        "source": "a.jsonl",
        "row": 2,
        "reason": "has no `response` (its columns: prompt)",
    }


def test_rejected_rows_of_a_second_source_are_added() -> None:
    rejected = Path("rejected.jsonl")
    for path in ("a.jsonl", "b.jsonl"):
        write_jsonl(path, GOOD, {"prompt": "x"})
        with pytest.warns(UserWarning, match="left out"):
            load_samples(path, on_bad_row="skip", rejected=rejected)
    told = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [(each["source"], each["row"]) for each in told] == [("a.jsonl", 2), ("b.jsonl", 2)]


def test_rows_may_be_skipped_without_a_file_for_them() -> None:
    path = write_jsonl("a.jsonl", GOOD, {"prompt": "x"})
    with pytest.warns(UserWarning, match="left out 1 of 2 rows:\n  a.jsonl, line 2: has no"):
        assert len(load_samples(path, on_bad_row="skip")) == 1


def test_good_files_write_no_rejected_file() -> None:
    load_samples(write_jsonl("a.jsonl", GOOD), on_bad_row="skip", rejected=Path("rejected.jsonl"))
    assert not Path("rejected.jsonl").exists()


def test_a_file_without_a_usable_row_is_an_error_even_when_skipping() -> None:
    path = write_jsonl("a.jsonl", {"prompt": "x"})
    with (
        pytest.warns(UserWarning, match="left out 1 of 1"),
        pytest.raises(ValueError, match=r"no row of a\.jsonl can be used:\n  a\.jsonl, line 1"),
    ):
        load_samples(path, on_bad_row="skip")


BROKEN_FILES = {
    "cut JSONL": ("a.jsonl", b'{"prompt": "a", "respo', "line 1: broken JSON: Unterminated string"),
    "huge number": (
        "a.jsonl",
        b'{"prompt": ' + b"9" * 5_000 + b"}",
        "line 1: broken JSON: Exceeds",
    ),
    "deep nesting": ("a.jsonl", b"[" * 100_000, "line 1: broken JSON: maximum recursion"),
    "Latin-1 JSONL": (
        "a.jsonl",
        b'{"prompt": "a", "response": "caf\xe9"}',
        "line 1: `response` is not valid UTF-8 at character 3",
    ),
    "Latin-1 CSV": (
        "a.csv",
        b"prompt,response\na,b\nc,caf\xe9\n",
        "line 3: `response` is not valid UTF-8 at character 3",
    ),
    "cut gzip": (
        "a.jsonl.gz",
        gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 9)[:-12],
        "broken file, nothing is read from here on",
    ),
    "no gzip": ("a.jsonl.gz", b"plain", "line 1: broken file, .* Not a gzipped file"),
    "object": ("a.json", b'{"data": []}', "row 0: the file is not a list of samples"),
    "cut JSON": (
        "a.json",
        b'[\n{"prompt": "a", "response": "b"},\n{"prompt": "a"',
        r"row 1: \(line 3\) broken JSON, nothing is read from here on",
    ),
    "unclosed list": (
        "a.json",
        b'[{"prompt": "a", "response": "b"}',
        r"row 1: \(line 1\) broken JSON.* a comma or the only \] must follow",
    ),
    "second list": (
        "a.json",
        b'[{"prompt": "a", "response": "b"}] []',
        r"row 1: \(line 1\) broken JSON.* a comma or the only \] must follow",
    ),
    "row of a list": ("a.json", b"[\n\n3]", r"row 0: \(line 3\) holds a int, not an object"),
    "CSV row too long": ("a.csv", b"prompt,response\na,b,c\n", "line 2: has 3 fields .* has 2"),
    "CSV row too short": ("a.csv", b"prompt,response\na\n", "line 2: has 1 fields .* has 2"),
    "CSV open quote": ("a.csv", b'prompt,response\na,b\nc,"d\ne,f\n', "line 3: broken CSV: unexp"),
    "CSV columns": ("a.csv", b"goal,target\na,b\n", "line 2: is in none of .*: goal, target"),
    "no Parquet": ("a.parquet", b"plain", "row 0: broken Parquet"),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_broken_file_is_an_error_with_the_place(kind: str) -> None:
    name, content, reason = BROKEN_FILES[kind]
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)cannot be used:.*{name}, .*{reason}"):
        load_samples(name)


def test_the_good_rows_before_a_break_are_kept_when_skipping() -> None:
    Path("a.json").write_text('[{"prompt": "a", "response": "b"}, {"prompt"', encoding="utf-8")
    with pytest.warns(UserWarning, match="nothing is read from here on"):
        assert len(load_samples("a.json", on_bad_row="skip")) == 1


@pytest.mark.parametrize("name", ["no.jsonl", "no.jsonl.gz", "no.json", "no.CSV", "no.parquet"])
def test_a_missing_file_is_an_error_and_no_hub_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is missing; give the path"):
        load_samples(name)


EMPTY = {
    "a.jsonl": b"\n",
    "b.jsonl": b"",
    "a.jsonl.gz": gzip.compress(b""),
    "a.json": b" ",
    "b.json": b"[ ]",
    "a.csv": b"",
    "b.csv": b"prompt,response\n",
    "a.parquet": b"",
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_file_is_an_error(name: str) -> None:
    Path(name).write_bytes(EMPTY[name])
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name} is empty; it needs at least one sample"):
            load_samples(name)


def test_a_parquet_file_without_rows_is_empty() -> None:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet is empty"):
        load_samples("a.parquet")


def test_an_unknown_file_type_is_an_error_that_names_the_known() -> None:
    Path("a.txt").write_text("Hi", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.txt has an unknown file type; known are \.jsonl, "):
        load_samples("a.txt")


def test_a_hub_name_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot load split 'train' of 'nobody/nothing'"):
        load_samples("nobody/nothing")


def test_a_split_that_does_not_exist_is_an_error(folder: Path) -> None:
    (folder / "mine").mkdir()
    write_jsonl("mine/train.jsonl", GOOD)
    with pytest.raises(ValueError, match=r"cannot load split 'nope' of 'mine'.*nope"):
        load_samples("mine", split="nope")


def test_no_path_is_an_error() -> None:
    with pytest.raises(ValueError, match="no path is given"):
        load_samples([])


def test_a_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = count_reads(monkeypatch)
    path = write_jsonl("a.jsonl", GOOD)
    first = load_samples(path)
    os.utime(path, (0, 0))
    second = load_samples(path)
    assert len(read) == 1
    assert first._fingerprint == second._fingerprint


def test_a_file_edited_in_place_is_read_again_though_its_size_and_time_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = count_reads(monkeypatch)
    path = write_jsonl("a.jsonl", GOOD)
    stat = Path(path).stat()
    first = load_samples(path)
    write_jsonl("a.jsonl", {**GOOD, "response": "Hullo."})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Path(path).stat().st_size == stat.st_size
    second = load_samples(path)
    assert len(read) == 2
    assert first[0]["messages"][1]["content"] == "Hello."
    assert second[0]["messages"][1]["content"] == "Hullo."
    assert first._fingerprint != second._fingerprint


def test_two_files_with_the_same_content_keep_their_names() -> None:
    write_jsonl("a.jsonl", GOOD)
    write_jsonl("b.jsonl", GOOD)
    assert load_samples(["a.jsonl", "b.jsonl"])["source"][:] == ["a.jsonl", "b.jsonl"]


def test_the_samples_lie_on_disk(folder: Path) -> None:
    samples = load_samples(write_jsonl("a.jsonl", GOOD))
    assert samples.cache_files
    assert Path(samples.cache_files[0]["filename"]).is_relative_to(folder / "cache")


def write_many(path: str, num_rows: int) -> int:
    """Write a file of equal rows; returns its size in bytes."""
    row = json.dumps({"prompt": "word " * 20, "response": "word " * 40, "client": "c"})
    rows = [row] * num_rows
    text = "\n".join(rows) if path.endswith(".jsonl") else "[" + ",\n".join(rows) + "]"
    Path(path).write_text(text, encoding="utf-8")
    return len(text)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["big.jsonl", "big.json"])
def test_no_file_is_held_as_objects(path: str) -> None:
    size = write_many(path, 8_000)
    tracemalloc.start()
    load_samples(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # As objects the rows take 12 MB; of a JSON list the text is held, as bytes and decoded.
    assert peak < 3_000_000 + (2.2 * size if path.endswith(".json") else 0)


@pytest.mark.slow
def test_a_hundred_thousand_rows_are_read_in_seconds() -> None:
    write_many("big.jsonl", 100_000)
    started = time.perf_counter()
    assert len(load_samples("big.jsonl")) == 100_000
    cold = time.perf_counter() - started
    started = time.perf_counter()
    load_samples("big.jsonl")
    assert cold < 60
    assert time.perf_counter() - started < cold / 5


@pytest.mark.real_data
def test_the_alpaca_file_is_read_whole(real_data: Path) -> None:
    samples = load_samples(str(real_data / "benign" / "alpaca_en_demo.json"))
    assert len(samples) == 999
    assert samples[0]["messages"][0]["role"] == "user"


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("benign/self_instruct_seed_tasks.jsonl", "175 of 175 .*line 1: has no `output`"),
        ("hhh/hhh_alignment.jsonl", "221 of 221 .*is in none of .* category, query, chosen, rej"),
        ("xstest/xstest_prompts.csv", "450 of 450 .*line 2: has no `response`"),
        ("advbench/harmful_behaviors.csv", "520 of 520 .*line 2: is in none of .*: goal, target"),
        ("openai_moderation/samples-1680.jsonl.gz", "1680 of 1680 .*line 1: has no `response`"),
        ("kosbi/kosbi_valid.json", r"3421 of 3421 .*row 0: \(line 2\) is in none of"),
    ],
)
def test_real_files_of_other_formats_are_refused(real_data: Path, name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        load_samples(str(real_data / name))


def test_a_part_of_a_data_set_is_named_after_a_colon(tmp_path: Path) -> None:
    for part in ("harmless", "helpful"):
        (tmp_path / "set" / part).mkdir(parents=True)
        row = {"prompt": f"{part} question", "response": "answer"}
        (tmp_path / "set" / part / "train.jsonl").write_text(json.dumps(row) + "\n")
    samples = load_samples(f"{tmp_path}/set:harmless")
    assert [row["messages"][0]["content"] for row in samples] == ["harmless question"]
