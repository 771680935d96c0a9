"""Files in other formats become chat JSONL: the rows of docs/data.md, what is kept of them, and what each flag does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.data.formats import convert as convert_module
from finetune.data.formats.convert import Account, Options, convert
from finetune.data.formats.sources import open_source
from finetune.data.jsonl import NO_TOOLS
from finetune.data.template import Messages
from finetune.data.tokenizer import Chat
from finetune.errors import ConfigError, DataError, UserError
from support.conversations import conversation, encoded, weighted
from support.data_page import FILES, Row, example, rendered, table
from support.prepared import the_reference


def summary(account: Account) -> str:
    """An account as a cell of the table has it."""
    parts = [f"{sum(account.written.values())} of {account.read}"]
    for title, tallies in (("", account.changed), ("not read: ", account.unread), ("dropped: ", account.dropped)):
        if tallies:
            parts.append(title + ", ".join(f"{what} ({tally.count})" for what, tally in tallies.items()))
    return "; ".join(parts)


def conversations(path: Path) -> list[Messages]:
    return [json.loads(line)["messages"] for line in path.read_bytes().splitlines()]


def rows_file(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def converted(name: str, folder: Path, **options: Any) -> tuple[list[Messages], Account]:
    account = convert(open_source(name), {"train": folder / "made.jsonl"}, Options(**options))
    return conversations(folder / "made.jsonl"), account


# --- the table of docs/data.md


@pytest.mark.parametrize("row", table(), ids=lambda row: f"{row.format}: {row.example}")
def test_a_format_becomes_what_the_page_says_with_mistrals_own_ids_and_labels(
    tmp_path: Path, mistral: Chat, row: Row
) -> None:
    path, output = example(row, tmp_path), tmp_path / "made.jsonl"
    try:
        made = summary(convert(open_source(str(path)), {"train": output}, Options()))
    except UserError as error:
        made = rendered(str(error).replace(str(output), "OUT"), path)
    assert made == row.converted
    for messages in conversations(output) if output.exists() else ():
        assert encoded(mistral, messages) == the_reference().encode(messages)


SKY_AND_WATER = [
    conversation("The sky is", " blue."),
    conversation("Water boils at", " 100 °C at sea level."),
]
KEPT = {
    "openai.jsonl": [
        conversation("What's the capital of France?", "Paris",
            system="Marv is a factual chatbot that is also sarcastic."),
        conversation("Who wrote\n\nRomeo and Juliet?", "Shakespeare."),
    ],
    "weights.jsonl": [
        weighted(conversation("Name a river in France.", "The Rhine, I think.", "A longer one?", "The Loire."), 0, 1),
        conversation("Where does it end?", "Nantes.", system="Answer in one word."),
    ],
    "lists.jsonl": [conversation("Hello", "Hello! What can I do?"), conversation("Ping", "Pong.")],
    "conversations.jsonl": [
        conversation("Why is the sky blue?", "Because air scatters blue light most."),
        conversation("And at dusk?", "Then the light's way is longer."),
    ],
    "sharegpt.json": [
        conversation("Summarise the main ideas of Jeff Walker's Product Launch Formula.",
            "Here are the main ideas:\n\n1. Build anticipation.\n2. Open the cart for a few days only.",
            "Thanks! Which comes first?",
            "Anticipation: a sequence of useful messages before anything is sold."),
        conversation("How do I write a for-loop in Rust?", '```rust\nfor i in 0..10 {\n    println!("{i}");\n}\n```'),
        conversation("How long do I boil an egg?", "Seven minutes for a soft yolk.", system="You are a chef."),
    ],
    "alpaca.json": [
        conversation("Give three tips for staying healthy.",
            "1. Eat a balanced diet.\n2. Exercise regularly.\n3. Get enough sleep."),
        conversation("Identify the odd one out.\n\nTwitter, Instagram, Telegram", "Telegram"),
        conversation("Explain why the following fraction is equivalent to 1/4\n\n4/16",
            "Both numbers can be divided by 4: 4/16 = 1/4."),
    ],
    "prompt_completion.jsonl": SKY_AND_WATER,
    "wrapped.json": SKY_AND_WATER,
    "prompt_completion_chat.jsonl": [
        conversation("What color is the sky?", "It is blue."),
        conversation("Where is the sun?", "Above.", system="Answer in one word."),
    ],
    "questions.csv": [
        conversation("What is 2 + 2?", "4"),
        conversation('Who said "I think, therefore I am"?', "René Descartes,\nin 1637"),
    ],
    "kto.jsonl": [conversation("Is the earth flat?", "No, it is round.")],
    "preferences.jsonl": [
        conversation("Is the earth flat?", "No, it is round."), conversation("Is water wet?", "Yes."),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_every_word_of_a_conversation_is_kept_in_its_place(tmp_path: Path, name: str) -> None:
    assert converted(str(FILES / name), tmp_path)[0] == KEPT[name]


@pytest.mark.parametrize("name", ["alpaca.json", "sharegpt.json"])
def test_parquet_gives_what_the_json_gives(tmp_path: Path, name: str) -> None:
    path = example(Row("", f"`{name}` as Parquet", "", ""), tmp_path)
    assert converted(str(path), tmp_path)[0] == KEPT[name]


# --- shapes


def test_the_turns_before_an_alpaca_row_come_from_its_history(tmp_path: Path) -> None:
    row = {"instruction": "And 3?", "input": "", "output": "9", "history": [["2 squared?", "4"]], "system": "Be short."}
    made, account = converted(rows_file(tmp_path, row), tmp_path)
    assert made == [conversation("2 squared?", "4", "And 3?", "9", system="Be short.")]
    assert summary(account) == "1 of 1; system prompt became the system message (1)"


A, B = conversation("A", "B")
CANNOT_BE_KEPT = {
    "two system prompts": (
        {"system": "A", "conversations": [{"from": "system", "value": "B"}, {"from": "human", "value": "C"}]},
        "has two system prompts, expected one"),
    "a function call": (
        {"conversations": [{"from": "human", "value": "A"}, {"from": "function_call", "value": "f()"}]},
        f"a message has role 'tool': {NO_TOOLS}"),
    "tools of a ShareGPT row": (
        {"tools": '[{"name": "f"}]', "conversations": [{"from": "human", "value": "A"}]},
        f"has a key 'tools': {NO_TOOLS}"),
    "images": (
        {"prompt": "A", "completion": "B", "images": ["a.png"]}, "has a key 'images': the model reads text only"),
    "a weight between": (
        {"messages": [A, B | {"weight": 0.5}]}, "a message has weight 0.5, expected 0, 1 or no weight"),
    "messages marked bad": ({"messages": [A, B], "label": False}, "label marks the answer as bad"),
    "an unknown role": (
        {"conversations": [{"from": "narrator", "value": "A"}]},
        "a message has role 'narrator', expected system, user or assistant"),
    "no text": ({"prompt": None, "completion": "B"}, "a message has content that is null, expected text"),
    "two answers": ({"messages": [A, B, B]}, "two consecutive turns of one role; --merge-turns joins them"),
    "unknown keys": ({"a": 1, "b": 2}, "no known format (keys 'a', 'b')"),
    "no object": (7, "no known format (not an object)"),
    "an escape sequence in a key": ({"\x1b[2J": 1}, r"no known format (keys '\x1b[2J')"),
    "a history that is none": (
        {"instruction": "A", "output": "B", "history": [["C"]]}, "history is not a list of pairs [question, answer]"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), CANNOT_BE_KEPT.values(), ids=CANNOT_BE_KEPT.keys())
def test_a_row_that_cannot_be_kept_whole_is_dropped_with_the_reason(tmp_path: Path, row: Any, reason: str) -> None:
    account = converted(rows_file(tmp_path, row, {"prompt": "A", "completion": "B"}), tmp_path)[1]
    assert {what: (tally.count, tally.first) for what, tally in account.dropped.items()} == {reason: (1, [1])}
    assert account.written == {"train": 1}


def test_a_label_of_another_kind_and_keys_of_messages_are_named_as_not_read(tmp_path: Path) -> None:
    rows = [
        {"question": "A", "answer": "B", "label": "sums", "id": None},
        {"conversations": [{"from": "human", "value": "C", "time": 1}, {"from": "gpt", "value": "D", "time": 2}]},
    ]
    made, account = converted(rows_file(tmp_path, *rows), tmp_path)
    assert made == [conversation("A", "B"), conversation("C", "D")]
    assert summary(account) == "2 of 2; not read: label (1), time of a message (1)"
    assert {name: tally.first for name, tally in account.formats.items()} == {
        "prompt and completion (question/answer)": [1],
        "ShareGPT (conversations/from/value)": [2],
    }


def test_reasons_are_counted_together_and_the_first_five_rows_named(tmp_path: Path) -> None:
    empty = [{"messages": [*[A, B] * times, A | {"content": " "}, B]} for times in range(7)]
    account = converted(rows_file(tmp_path, *empty, {"messages": [A, B]}), tmp_path)[1]
    assert {what: (tally.count, tally.first) for what, tally in account.dropped.items()} == {
        "a message (user) is empty": (7, [1, 2, 3, 4, 5])
    }


# --- flags


def test_merged_turns_have_the_ids_that_mistral_common_gives_the_turns_as_they_are(
    tmp_path: Path, mistral: Chat
) -> None:
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    made, account = converted(str(FILES / "two_turns.jsonl"), tmp_path, merge_turns=True)
    assert made[0] == conversation("Hello\n\nAnyone there?", "Yes.")
    assert summary(account) == "2 of 2; consecutive turns of one role joined by a blank line (--merge-turns) (1)"
    asked = [UserMessage(content="Hello"), UserMessage(content="Anyone there?"), AssistantMessage(content="Yes.")]
    request: Any = ChatCompletionRequest(messages=[*asked, UserMessage(content="x")])
    theirs = MistralTokenizer.v1().encode_chat_completion(request).tokens
    assert mistral.encode_prompt([*made[0], {"role": "user", "content": "x"}]) == theirs


def test_answers_of_different_weights_are_not_merged(tmp_path: Path) -> None:
    masked = B | {"weight": 0}
    rows = [[A, masked, masked], [A | {"weight": 0}, A, B, B | {"weight": 1}], [A, masked, B]]
    made, account = converted(rows_file(tmp_path, *({"messages": row} for row in rows)), tmp_path, merge_turns=True)
    assert made == [weighted(conversation("A", "B\n\nB"), 0), conversation("A\n\nA", "B\n\nB")]
    assert {what: tally.first for what, tally in account.dropped.items()} == {
        "two consecutive turns of one role with different weights": [3]
    }


def test_a_system_message_is_added_where_a_row_has_none_or_an_empty_one(tmp_path: Path) -> None:
    made, account = converted(str(FILES / "openai.jsonl"), tmp_path, system="Be kind.")
    assert [messages[0]["content"] for messages in made] == [
        "Marv is a factual chatbot that is also sarcastic.",
        "Be kind.",
    ]
    assert summary(account) == "2 of 2; system message added (--system) (1)"


def test_columns_are_named_and_the_others_are_not_read(tmp_path: Path) -> None:
    columns = {"prompt": "Frage", "completion": "Antwort"}
    assert converted(str(FILES / "excel.csv"), tmp_path, columns=columns)[0] == [
        conversation("Was ist 2 + 2?", "4"),
        conversation("Und 3 + 3?", "6"),
    ]
    row = {"Q": "A", "A": "B", "prompt": "C", "messages": [{"role": "user", "content": "D"}]}
    (tmp_path / "made.jsonl").unlink()
    made, account = converted(rows_file(tmp_path, row), tmp_path, columns={"prompt": "Q", "completion": "A"})
    assert made == [conversation("A", "B")]
    assert summary(account) == "1 of 1; not read: prompt (column) (1), messages (1)"


def test_a_column_that_is_not_there_is_a_config_error_that_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        converted(str(FILES / "excel.csv"), tmp_path, columns={"prompt": "Question"})
    assert caught.value.found == "--columns: no column 'Question', the first row has 'Frage', 'Antwort'"


def split(folder: Path, *rows: Any) -> tuple[list[Messages], list[Messages]]:
    outputs = {"train": folder / "made.jsonl", "validation": folder / "val.jsonl"}
    convert(open_source(rows_file(folder, *rows)), outputs, Options(split_by="source"))
    return conversations(outputs["train"]), conversations(outputs["validation"])


def test_rows_of_one_value_are_on_one_side_and_a_tenth_of_the_values_is_held_out(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{turn}", "completion": f"{group}", "source": f"{group}"} for turn in "AB" for group in range(30)
    ]
    train, held_out = split(tmp_path, *rows)
    groups = [{messages[1]["content"] for messages in side} for side in (train, held_out)]
    assert [len(side) for side in groups] == [27, 3]
    assert groups[0] & groups[1] == set()
    assert (len(train), len(held_out)) == (54, 6)


def test_values_that_name_a_split_decide_it(tmp_path: Path) -> None:
    names = ["train", "test", "train", "Validation"]
    rows = [{"prompt": name, "completion": str(row), "source": name} for row, name in enumerate(names)]
    assert split(tmp_path, *rows) == (
        [conversation("train", "0"), conversation("train", "2")],
        [conversation("test", "1"), conversation("Validation", "3")],
    )


def test_a_key_with_one_value_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        split(tmp_path, {"prompt": "A", "completion": "B"})
    assert caught.value.found == "--split-by source: every row has the value 'None', expected at least two values"


# --- the file that is written


OUTPUTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "an existing file": ("made.jsonl", lambda path: path.write_text("mine"),
        "OUT already exists, and nothing is overwritten; name another file"),
    "a folder": ("made.jsonl", Path.mkdir, "OUT is a folder, expected a file; name one in it: OUT/train.jsonl"),
    "a path below a file": ("file/made.jsonl", lambda path: path.parent.touch(),
        "OUT cannot be written: File exists; name another file"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "occupy", "message"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_an_output_that_cannot_be_written_is_a_config_error_and_stays_as_it_is(
    tmp_path: Path, name: str, occupy: Callable[[Path], object], message: str
) -> None:
    output = tmp_path / name
    occupy(output)
    before = [(path, path.is_file() and path.read_text()) for path in tmp_path.rglob("*")]
    with pytest.raises(ConfigError) as caught:
        convert(open_source(str(FILES / "lists.jsonl")), {"train": output}, Options())
    assert caught.value.problems == (message.replace("OUT", str(output)),)
    assert [(path, path.is_file() and path.read_text()) for path in tmp_path.rglob("*")] == before


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    output, source = tmp_path / "made.jsonl", open_source(str(FILES / "lists.jsonl"))

    def rows() -> Iterator[tuple[int, Any]]:
        yield from source.rows()
        output.write_text("mine")

    with pytest.raises(ConfigError) as caught:
        convert(replace(source, rows=rows), {"train": output}, Options())
    assert caught.value.found == f"{output} already exists, and nothing is overwritten"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError("damaged")])
def test_a_conversion_that_ends_early_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    seen: list[Any] = []

    def failing(row: Any, *_: Any) -> Messages:
        seen.append(row)
        if len(seen) == 2:
            raise error
        return conversation("A", "B")

    monkeypatch.setattr(convert_module, "convert_row", failing)
    with pytest.raises((KeyboardInterrupt, DataError)):
        converted(str(FILES / "lists.jsonl"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    outputs = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    for output in outputs:
        convert(open_source(str(FILES / "questions.csv")), {"train": output}, Options())
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert outputs[0].read_bytes().endswith('"content": "René Descartes,\\nin 1637"}]}\n'.encode())


def test_what_json_does_not_have_drops_a_row(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"prompt": [b"\xff"], "completion": ["B"]}), path)
    with pytest.raises(DataError) as caught:
        converted(str(path), tmp_path)
    assert caught.value.found == (
        f"no conversation for {tmp_path / 'made.jsonl'}: "
        "1 of 1 rows dropped: contains a value of type bytes, which JSON does not have"
    )
