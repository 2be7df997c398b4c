"""Prompt sets: what the shipped ones promise, what each public format becomes, and that every user error teaches."""

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import ModuleType, SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UserError
from prompts import QUICK, Prompt, PromptSet, available, hub, load
from prompts.prompt import take

STANDARD = load("standard")
PASSAGES = {"summarization", "rag", "editing"}
CATEGORIES = {
    *("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"),
    *("translation", *PASSAGES),
}


def written(path: Path, *lines: object) -> str:
    """The path of a JSONL file of these lines; a text is written as it stands."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(spec: str, limit: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(spec, limit=limit)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


# The shipped sets


def test_standard_has_eight_prompts_in_each_of_twelve_categories() -> None:
    assert Counter(prompt.category for prompt in STANDARD.prompts) == dict.fromkeys(CATEGORIES, 8)
    assert all(re.fullmatch(rf"{prompt.category}-0[1-8]", prompt.id) for prompt in STANDARD.prompts)


def test_a_third_of_standard_has_two_turns_in_every_category() -> None:
    assert {len(prompt.turns) for prompt in STANDARD.prompts} == {1, 2}
    two_turn = Counter(prompt.category for prompt in STANDARD.prompts if len(prompt.turns) == 2)
    assert two_turn.total() == 32
    assert two_turn.keys() == CATEGORIES
    assert set(two_turn.values()) == {2, 3}


@pytest.mark.parametrize("rows", range(1, 9))
def test_a_limited_standard_set_keeps_the_share_of_two_turn_prompts(rows: int) -> None:
    limited = load("standard", limit=12 * rows).prompts
    assert sum(len(prompt.turns) == 2 for prompt in limited) == 4 * rows


def test_no_turn_is_empty_or_very_long() -> None:
    for prompt in STANDARD.prompts:
        assert all(turn == turn.strip() and 0 < len(turn) <= 2500 for turn in prompt.turns), prompt.id


def test_turns_are_as_long_as_their_kind_needs() -> None:
    for prompt in STANDARD.prompts:
        count = len(prompt.turns[0].split())
        assert (100 if prompt.category in PASSAGES else 20) <= count <= (330 if prompt.category in PASSAGES else 120)


def test_no_two_prompts_are_nearly_the_same() -> None:
    """Word 4-grams in common, as a share of the shorter turn's; a turn may share words with the next of its prompt."""
    turns = [(prompt.id, words(turn)) for prompt in STANDARD.prompts for turn in prompt.turns]
    shingles = [(name, {tuple(text[i : i + 4]) for i in range(len(text) - 3)}) for name, text in turns]
    for (one, a), (other, b) in combinations(shingles, 2):
        assert one == other or len(a & b) / min(len(a), len(b)) < 0.2, (one, other)


def test_code_blocks_are_closed() -> None:
    for prompt in STANDARD.prompts:
        fences = prompt.turns[0].count("```")
        assert fences == (2 if prompt.category == "editing" else 0), prompt.id


def test_quick_is_eight_short_prompts_of_eight_kinds() -> None:
    quick = load("quick")
    assert tuple(prompt.id for prompt in quick.prompts) == QUICK
    assert len(quick.categories) == len(quick.prompts) == 8
    assert sum(len(prompt.turns) == 2 for prompt in quick.prompts) in (1, 2)
    assert all(len(turn.split()) <= 60 for prompt in quick.prompts for turn in prompt.turns)
    assert set(quick.prompts) <= set(STANDARD.prompts)


def test_available_describes_every_shipped_set_with_its_counts() -> None:
    described = available()
    assert described.keys() == {"standard", "quick"}
    assert described["standard"].startswith("96 prompts in 12 categories, 32 ")
    assert described["quick"].startswith("8 prompts in 8 categories, 2 ")
    assert all("\n" not in line for line in described.values())


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, prompts; print(*{'torch', 'transformers', 'huggingface_hub', 'pyarrow'} & sys.modules.keys())"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout.strip() == ""


# The hash


def test_hash_is_stable_across_formats_and_files(tmp_path: Path) -> None:
    rows = [{"id": "a", "category": "x", "turns": ["Hi"]}, {"id": "b", "category": "x", "turns": ["Ünder", "So?"]}]
    plain = load(written(tmp_path / "one.jsonl", *rows))
    reordered = load(written(tmp_path / "two.jsonl", *({key: row[key] for key in reversed(row)} for row in rows)))
    assert plain.sha256 == reordered.sha256
    # sha256 of [{"category":"x","id":"a","turns":["Hi"]},{"category":"x","id":"b","turns":["Ünder","So?"]}] in UTF-8
    assert plain.sha256 == "5850de9341c0ed8eb0d9045bdabd364f0770103b723e51933231bb6854925361"


@pytest.mark.parametrize("change", [{"id": "other"}, {"category": "other"}, {"turns": ("Hello", "Bye ")}])
def test_hash_changes_when_a_prompt_changes(change: dict[str, object]) -> None:
    first, second = Prompt(id="a", category="x", turns=("Hello", "Bye")), Prompt(id="b", category="x", turns=("Hi",))
    before = PromptSet(name="n", prompts=(first, second), source="s")
    changed = PromptSet(name="n", prompts=(msgspec.structs.replace(first, **change), second), source="s")
    swapped = PromptSet(name="n", prompts=(second, first), source="s")
    assert len({before.sha256, changed.sha256, swapped.sha256}) == 3
    assert before.sha256 == PromptSet(name="m", prompts=(first, second), source="t").sha256


# The limit


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=30), st.integers(1, 40))
def test_limit_takes_turns_over_the_categories(categories: list[str], limit: int) -> None:
    prompts = tuple(Prompt(id=str(i), category=name, turns=("?",)) for i, name in enumerate(categories))
    taken = take(prompts, limit)
    assert len(taken) == min(limit, len(prompts))
    assert list(taken) == [prompt for prompt in prompts if prompt in taken]
    assert set(take(prompts, max(1, limit - 1))) <= set(taken)
    counts, sizes = Counter(prompt.category for prompt in taken), Counter(categories)
    for name in sizes:  # no category is ahead of another that still has prompts left
        assert all(counts[name] >= counts[other] - 1 or counts[name] == sizes[name] for other in sizes)
        assert [p for p in taken if p.category == name] == [p for p in prompts if p.category == name][: counts[name]]


def test_limit_is_deterministic_and_covers_the_categories() -> None:
    assert load("standard", limit=12) == load("standard", limit=12)
    assert set(load("standard", limit=12).categories) == CATEGORIES
    assert len(load("standard", limit=5).categories) == 5


def test_a_limit_that_leaves_nothing_out_changes_nothing() -> None:
    assert load("standard", limit=96) == load("standard", limit=1000) == STANDARD
    assert load("standard", limit=95).sha256 != STANDARD.sha256


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_an_error(limit: int) -> None:
    assert f"limit of {limit}" in error_of("standard", limit)


# Public formats


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(
            {"question_id": 81, "category": "poems", "turns": ["One?", "Two?"], "reference": ["1", "2"]},
            Prompt(id="81", category="poems", turns=("One?", "Two?")),
            id="MT-Bench",
        ),
        pytest.param(
            {"question_id": 241, "category": "qa", "turns": ["Who?"]},
            Prompt(id="241", category="qa", turns=("Who?",)),
            id="Spec-Bench",
        ),
        pytest.param(
            {
                "task_id": "Set/0",
                "prompt": "\ndef f():\n",
                "entry_point": "f",
                "canonical_solution": "",
                "test": "pass",
            },
            Prompt(id="Set/0", category="made_up", turns=("\ndef f():\n",)),
            id="HumanEval",
        ),
        pytest.param(
            {"question": "How many?", "answer": "#### 3"},
            Prompt(id="made_up-0001", category="made_up", turns=("How many?",)),
            id="GSM8K",
        ),
        pytest.param(
            {"prompt": "Hello"}, Prompt(id="made_up-0001", category="made_up", turns=("Hello",)), id="plain prompt"
        ),
        pytest.param(
            {"prompt_id": "7", "category": "x", "prompt": ["A", "B"], "reference": None},
            Prompt(id="7", category="x", turns=("A", "B")),
            id="prompt with turns",
        ),
        pytest.param(
            {"turns": ["A", "B", "C"], "category": None},
            Prompt(id="made_up-0001", category="made_up", turns=("A", "B", "C")),
            id="plain turns",
        ),
        pytest.param(
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "A"},
                    {"role": "assistant", "content": "no"},
                    {"role": "user", "content": "B"},
                ]
            },
            Prompt(id="made_up-0001", category="made_up", turns=("A", "B")),
            id="chat",
        ),
        pytest.param(
            {"prompt": "A", "messages": [{"role": "user", "content": "A"}, {"role": "user", "content": "B"}]},
            Prompt(id="made_up-0001", category="made_up", turns=("A", "B")),
            id="chat that repeats its prompt",
        ),
    ],
)
def test_public_formats_are_recognised(tmp_path: Path, row: object, expected: Prompt) -> None:
    found = load(written(tmp_path / "made_up.jsonl", row))
    assert found.prompts == (expected,)
    assert found.name == "made_up"
    assert "made_up.jsonl" in found.source
    assert found.license is None


def test_a_gzipped_file_reads_like_a_plain_one(tmp_path: Path) -> None:
    plain = written(tmp_path / "set.jsonl", {"prompt": "A"}, {"prompt": "B"})
    (tmp_path / "set.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    zipped = load(f"{plain}.gz")
    assert (zipped.name, zipped.sha256) == ("set", load(plain).sha256)


def test_byte_order_mark_blank_lines_and_line_separators_inside_a_text_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n\r\n\n{"prompt": "c"}\r\n'.encode())
    prompts = load(str(path)).prompts
    assert [prompt.turns for prompt in prompts] == [("a\u2028b",), ("c",)]
    assert [prompt.id for prompt in prompts] == ["odd-0001", "odd-0004"]


# User errors


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([""], "is empty; write one JSON object"),
        (["\n  \n"], "is empty; write one JSON object"),
        ([{"prompt": "a"}, '{"prompt": '], "bad.jsonl line 2: not JSON"),
        (["[" * 100_000], "bad.jsonl line 1: not JSON"),
        (['{"prompt": "\\ud800"}'], "bad.jsonl line 1: not JSON"),
        (["[", '  {"prompt": "a"}', "]"], "bad.jsonl line 1: not JSON"),
        (['["a"]'], "line 1: a list, not a JSON object"),
        (["3"], "line 1: the number 3, not a JSON object"),
        (["null"], "line 1: null, not a JSON object"),
        ([{"text": "a", "lang": "en"}], "no prompt in the fields 'text', 'lang'; name the field that holds it 'turns'"),
        ([{}], "no prompt in the fields (none)"),
        ([{"prompt": "a", "categry": "x"}], "unknown field 'categry'; did you mean 'category'?"),
        ([{"turn": ["a"]}], "unknown field 'turn'; did you mean 'turns'?"),
        ([{"prompt": "a"}, {"prompt": "  "}], "line 2: turn 1 is an empty text"),
        ([{"turns": []}], "no turns; give a list"),
        ([{"turns": {"first": "a"}}], "no turns; give a list"),
        ([{"turns": ["a", 3]}], "turn 2 is the number 3"),
        ([{"turns": ["a", True]}], "turn 2 is true"),
        ([{"prompt": None}], "no prompt in the fields (none)"),
        ([{"messages": []}], "no message of the user"),
        ([{"messages": "hi"}], "no message of the user"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "no message of the user"),
        ([{"messages": [{"from": "human", "value": "a"}]}], "a message needs two fields"),
        ([{"messages": [{"role": "user", "content": [{"type": "text"}]}]}], "turn 1 is a list"),
        ([{"id": [1], "prompt": "a"}], "the id is a list"),
        ([{"id": True, "prompt": "a"}], "the id is true"),
        ([{"id": "", "prompt": "a"}], "the id is an empty text"),
        ([{"category": 4, "prompt": "a"}], "the category is the number 4"),
        ([{"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b"}, {"id": "1", "prompt": "c"}], "bad.jsonl line 3: id '1'"),
    ],
)
def test_bad_lines_are_one_line_errors(tmp_path: Path, lines: list[object], says: str) -> None:
    assert says in error_of(written(tmp_path / "bad.jsonl", *lines))


def test_a_repeated_id_names_both_lines(tmp_path: Path) -> None:
    message = error_of(written(tmp_path / "bad.jsonl", {"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}))
    assert "bad.jsonl line 2" in message
    assert "at bad.jsonl line 1" in message


def test_text_that_is_not_utf8_is_a_one_line_error(tmp_path: Path) -> None:
    for text in ('{"prompt": "é"}'.encode("latin-1"), '{"prompt": "é"}'.encode("utf-16")):
        (tmp_path / "bad.jsonl").write_bytes(text)
        assert "line 1: not JSON" in error_of(str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("data", [b"not gzip", gzip.compress(b'{"prompt": "a"}' * 50, mtime=0)[:-12], b""])
def test_a_broken_gzip_file_is_a_one_line_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.jsonl.gz").write_bytes(data)
    assert "bad.jsonl.gz" in error_of(str(tmp_path / "bad.jsonl.gz"))


def test_a_missing_file_suggests_close_names(tmp_path: Path) -> None:
    written(tmp_path / "questions.jsonl", {"prompt": "a"})
    assert f"did you mean '{tmp_path / 'questions.jsonl'}'?" in error_of(str(tmp_path / "question.jsonl"))
    assert "did you mean 'standard'?" in error_of("standrd")


@pytest.mark.parametrize("spec", ["", "\0", "a\nb", "x" * 5000, "~no-such-user/x.jsonl", "no/such/folder/x.jsonl"])
def test_a_spec_that_names_nothing_says_what_can_be_given(spec: str) -> None:
    assert "give standard, quick, the path of a JSONL file, or hf:org/name" in error_of(spec)


def test_a_folder_is_a_one_line_error(tmp_path: Path) -> None:
    assert "directory" in error_of(str(tmp_path)).lower()


@given(st.text(max_size=40))
def test_no_line_of_text_gives_anything_but_a_one_line_value_error(text: str) -> None:
    from prompts.formats import Row, read

    try:
        value = json.loads(text)
    except ValueError:
        value = {text: text}
    try:
        read([Row("line 1", 1, value)], stem="s")
        message = ""
    except ValueError as error:
        message = str(error)
    assert "\n" not in message


# Parquet and the hub, with the libraries replaced by small stand-ins


def install_parquet(monkeypatch: pytest.MonkeyPatch, rows: list[object] | Exception) -> None:
    def read_table(path: Path) -> SimpleNamespace:
        if isinstance(rows, Exception):
            raise rows
        return SimpleNamespace(to_pylist=lambda: rows)

    pyarrow, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    vars(pyarrow).update(ArrowException=ArithmeticError, parquet=parquet)
    vars(parquet).update(read_table=read_table)
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)


def install_hub(monkeypatch: pytest.MonkeyPatch, files: dict[str, Path] | Exception) -> None:
    def dataset_info(repo: str) -> SimpleNamespace:
        if isinstance(files, Exception):
            raise files
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=name) for name in ("README.md", *files)],
            tags=["language:en", "license:mit"],
            sha="abc123",
        )

    def hf_hub_download(repo: str, file: str, *, repo_type: str, revision: str) -> str:
        assert not isinstance(files, Exception)
        assert (repo_type, revision) == ("dataset", "abc123")
        return str(files[file])

    client = ModuleType("huggingface_hub")
    vars(client).update(HfApi=lambda: SimpleNamespace(dataset_info=dataset_info), hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)


def test_parquet_rows_read_like_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sums.parquet").touch()
    install_parquet(monkeypatch, [{"question": "A?", "answer": "1"}, {"question": "B?", "answer": "2"}])
    assert [prompt.id for prompt in load(str(tmp_path / "sums.parquet")).prompts] == ["sums-0001", "sums-0002"]
    install_parquet(monkeypatch, [{"question": "A?"}, {"question": ""}])
    assert "sums.parquet row 2: turn 1" in error_of(str(tmp_path / "sums.parquet"))
    install_parquet(monkeypatch, ArithmeticError("magic bytes\nnot found"))
    assert "as parquet (magic bytes not found)" in error_of(str(tmp_path / "sums.parquet"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sums.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in error_of(str(tmp_path / "sums.parquet"))


@pytest.mark.parametrize("spec", ["hf:org/sums:test", "org/sums:test", "org/sums:data/test-00000-of-00001.jsonl"])
def test_a_hub_set_carries_its_source_and_license(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    path = Path(written(tmp_path / "blob.jsonl", {"question": "A?", "answer": "1"}))
    install_hub(monkeypatch, {"data/test-00000-of-00001.jsonl": path, "data/train-00000-of-00001.jsonl": path})
    found = load(spec)
    assert found.prompts == (Prompt(id="sums-0001", category="sums", turns=("A?",)),)
    assert found.license == "mit"
    assert "abc123" in found.source
    assert found.name == "org/sums:data/test-00000-of-00001.jsonl"


@pytest.mark.parametrize(
    ("files", "part", "chosen"),
    [
        (["a.jsonl"], None, "a.jsonl"),
        (["main/test-0.parquet", "main/train-0.parquet", "more/test-0.parquet"], "main/test", "main/test-0.parquet"),
        (["test.jsonl", "more/test.jsonl"], "test.jsonl", "test.jsonl"),
    ],
)
def test_the_file_that_a_hub_spec_names_is_chosen(files: list[str], part: str | None, chosen: str) -> None:
    assert hub.choose(files, repo="org/name", part=part) == chosen


@pytest.mark.parametrize(
    ("files", "part", "says"),
    [
        ([], None, "has no JSONL or parquet file"),
        (["a.jsonl", "b.jsonl"], None, "has several files; name one, as in hf:org/name:a.jsonl"),
        (["a.jsonl", "b.jsonl"], "test", "has no file 'test'; name one"),
        ([f"test-{i}.jsonl" for i in range(9)], "test", "test-5.jsonl, ...)"),
    ],
)
def test_a_hub_spec_that_names_no_single_file_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], part: str | None, says: str
) -> None:
    install_hub(monkeypatch, dict.fromkeys(files, tmp_path))
    assert says in error_of("hf:org/name" + (f":{part}" if part else ""))


@pytest.mark.parametrize("spec", ["hf:org/name", "org/name"])
def test_an_unreadable_hub_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    install_hub(monkeypatch, ConnectionError("name not known\nretry later " + "x" * 500))
    message = error_of(spec)
    assert "cannot read 'org/name' from the Hugging Face hub (ConnectionError: name not known retry later" in message
    assert "give the path" in message
    assert len(message) < 350


def test_hub_errors_before_any_network(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "'no-organisation' is no hub id" in error_of("hf:no-organisation")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in error_of("hf:org/name")
