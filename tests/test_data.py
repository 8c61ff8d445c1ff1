"""Prompt files, built-in prompts, and the order in which training sees them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from gcpo_t2i.data import Prompt, PromptSampler, collate_columns, load_prompts
from gcpo_t2i.errors import UserError
from gcpo_t2i.shapes import TAGS

# Three lines of GenEval's evaluation_metadata.jsonl, as published.
GENEVAL = """\
{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
{"tag": "counting", "include": [{"class": "bus", "count": 3}], "exclude": [{"class": "bus", "count": 4}], \
"prompt": "a photo of three buses"}
{"tag": "position", "include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": \
["right of", 0]}], "prompt": "a photo of a dog right of a cow"}
"""


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def fails(source: str) -> str:
    with pytest.raises(UserError) as caught:
        load_prompts(source)
    return str(caught.value)


def test_text_file_skips_blank_lines_and_tolerates_bom_and_crlf(tmp_path):
    source = write(tmp_path / "p.txt", b"\xef\xbb\xbfa red circle\r\n\r\n  a blue star \r\n\t\r\n")
    assert load_prompts(source) == [Prompt("a red circle"), Prompt("a blue star")]


def test_a_unicode_line_separator_does_not_end_a_line(tmp_path):
    assert load_prompts(write(tmp_path / "p.txt", "one\u2028line\ntwo")) == [Prompt("one\u2028line"), Prompt("two")]
    line = json.dumps({"prompt": "one\u2028line"}, ensure_ascii=False)
    assert load_prompts(write(tmp_path / "p.jsonl", line)) == [Prompt("one\u2028line")]


def test_geneval_metadata_loads_as_it_is(tmp_path):
    prompts = load_prompts(write(tmp_path / "meta.jsonl", GENEVAL))
    assert [prompt.text for prompt in prompts] == [json.loads(line)["prompt"] for line in GENEVAL.splitlines()]
    assert prompts[1].columns == {
        "tag": "counting",
        "include": [{"class": "bus", "count": 3}],
        "exclude": [{"class": "bus", "count": 4}],
    }
    assert prompts[1].negative is None


def test_negative_is_not_a_column_and_unknown_keys_are(tmp_path):
    source = write(tmp_path / "p.JSONL", '\n{"prompt": "a cat", "negative": "a dog", "gold": 3}\n{"prompt": "x"}')
    assert load_prompts(source) == [Prompt("a cat", "a dog", {"gold": 3}), Prompt("x")]


@pytest.mark.parametrize("name", ["shapesworld:train", "shapesworld:heldout"])
def test_built_in_prompts_carry_geneval_metadata_of_all_categories(name):
    prompts = load_prompts(name)
    assert {prompt.columns["tag"] for prompt in prompts} == set(TAGS)
    assert all(prompt.columns["include"] and "prompt" not in prompt.columns for prompt in prompts)


def test_train_and_heldout_share_no_prompt():
    train, heldout = (
        {prompt.text for prompt in load_prompts(f"shapesworld:{split}")} for split in ("train", "heldout")
    )
    assert train and heldout and not train & heldout


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.txt", "", "prompt file '{path}' is empty; write one prompt per line"),
        ("e.jsonl", " \n\r\n", "prompt file '{path}' is empty; write one prompt per line"),
        # offset 6: "caf" is 0-2, \n is 3, "ab" is 4-5
        (
            "l.txt",
            b"caf\nab\xe9\n",
            "prompt file '{path}' is not UTF-8: byte 0xe9 at offset 6 (line 2); save it as UTF-8",
        ),
        # the offset counts the file's bytes, so the three of the byte order mark too
        (
            "b.txt",
            b"\xef\xbb\xbf\xe9",
            "prompt file '{path}' is not UTF-8: byte 0xe9 at offset 3 (line 1); save it as UTF-8",
        ),
        (
            "u.jsonl",
            '{"prompt": "x"}'.encode("utf-16"),
            "prompt file '{path}' is not UTF-8: byte 0xff at offset 0 (line 1); save it as UTF-8",
        ),
        (
            "j.jsonl",
            '{"prompt": "x"}\n\n{"prompt": "y",}\n',
            "{path}, line 3: not valid JSON (Expecting property name enclosed in double quotes at column 16)",
        ),
        ("o.jsonl", "[1, 2]", '{path}, line 1: expected an object such as {{"prompt": "a red circle"}}, got [1, 2]'),
        ("k.jsonl", '{"text": "x", "tag": 1}', '{path}, line 1: no "prompt" among its keys (text, tag)'),
        ("z.jsonl", "{}", '{path}, line 1: no "prompt" among its keys (none)'),
        ("v.jsonl", '{"prompt": 3}', '{path}, line 1: "prompt" must be a text that is not empty, got 3'),
        ("w.jsonl", '{"prompt": " "}', "{path}, line 1: \"prompt\" must be a text that is not empty, got ' '"),
        ("n.jsonl", '{"prompt": "x", "negative": 1}', '{path}, line 1: "negative" must be a text or null, got 1'),
        (
            "r.jsonl",
            '{"prompt": "x", "images": 1}',
            '{path}, line 1: rename the column "images", rewards use that name for their own input',
        ),
        (
            "c.csv",
            "x",
            "prompts '{path}': expected a .txt or .jsonl file, hf:DATASET, or one of shapesworld:train, shapesworld:heldout; "
            "the suffix '.csv' is not supported",
        ),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    assert fails(path) == message.format(path=path)


def test_missing_file_folder_and_unknown_set(tmp_path):
    missing = tmp_path / "none.txt"
    assert fails(str(missing)) == f"prompt file '{missing}' does not exist"
    folder = tmp_path / "folder.txt"
    folder.mkdir()
    assert fails(str(folder)) == f"prompt file '{folder}' is a folder; give a .txt or .jsonl file"
    assert fails("shapesworld:held") == "prompts 'shapesworld:held' are unknown; did you mean 'shapesworld:heldout'?"


def test_columns_are_collated_with_none_where_a_prompt_lacks_one():
    prompts = [Prompt("a", columns={"tag": "x"}), Prompt("b", columns={"gold": 2}), Prompt("c")]
    assert collate_columns(prompts) == {"tag": ["x", None, None], "gold": [None, 2, None]}
    assert collate_columns([]) == {}


def numbered(n: int, **columns: str) -> list[Prompt]:
    return [Prompt(f"{columns.get('tag', '')}{i}", columns=columns) for i in range(n)]


def test_every_epoch_holds_every_prompt_once_in_a_new_order():
    sampler = PromptSampler(numbered(20), seed=0)
    first, second = ([prompt.text for prompt in sampler.batch(start, 20)] for start in (0, 20))
    assert sorted(first) == sorted(second) == sorted(str(i) for i in range(20))
    assert first != second
    assert first != [str(i) for i in range(20)]


def test_the_order_depends_on_seed_and_position_only():
    prompts = numbered(7, tag="a") + numbered(3, tag="b")
    whole = PromptSampler(prompts, seed=5).batch(0, 60)
    fresh = PromptSampler(prompts, seed=5)
    assert fresh.batch(24, 8) == whole[24:32]  # step 3 of a resumed run with 8 prompts per step
    assert [prompt for step in range(15) for prompt in fresh.batch(4 * step, 4)] == whole
    assert PromptSampler(prompts, seed=6).batch(0, 60) != whole


def test_tags_take_turns_however_unequal_they_are():
    sampler = PromptSampler(numbered(40, tag="big") + numbered(2, tag="small"), seed=1)
    assert Counter(prompt.columns["tag"] for prompt in sampler.batch(3, 8)) == {"big": 4, "small": 4}
    small = [prompt.text for prompt in sampler.batch(0, 12) if prompt.columns["tag"] == "small"]
    assert [set(small[i : i + 2]) for i in (0, 2, 4)] == [{"small0", "small1"}] * 3  # three epochs of two prompts


def test_a_step_of_the_default_run_sees_all_six_categories():
    sampler = PromptSampler(load_prompts("shapesworld:train"), seed=0)
    for step in range(5):
        assert {prompt.columns["tag"] for prompt in sampler.batch(8 * step, 8)} == set(TAGS)


def test_a_sampler_without_prompts_is_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptSampler([], seed=0)


def test_a_mix_gives_tags_their_turns() -> None:
    prompts = [Prompt(f"{tag}{i}", columns={"tag": tag}) for tag in "abc" for i in range(4)]
    sampler = PromptSampler(prompts, 0, {"a": 2, "b": 1})
    assert sampler.batch(0, 24) == PromptSampler(prompts, 0, {"a": 2, "b": 1, "c": 0}).batch(0, 24)
    drawn = [prompt.text for prompt in sampler.batch(0, 12)]
    assert [text[0] for text in drawn] == list("aba" * 4)
    assert sorted(text for text in drawn[:6] if text[0] == "a") == ["a0", "a1", "a2", "a3"]  # an epoch before a repeat
    assert sorted(text for text in drawn if text[0] == "b") == ["b0", "b1", "b2", "b3"]


@pytest.mark.parametrize("mix", [{}, {"a": 1, "b": 1, "x": 1}, {"a": 0, "b": 0}, {"a": -1, "b": 1}])
def test_a_mix_that_does_not_fit_is_refused(mix: dict[str, int]) -> None:
    prompts = [Prompt(tag, columns={"tag": tag}) for tag in "ab"]
    with pytest.raises(UserError, match="train_mix"):
        PromptSampler(prompts, 0, mix)
