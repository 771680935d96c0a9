"""The handoff receipt: a Mac and an H100 that would train the same thing agree, and whatever differs is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.config.base_model import MISTRAL
from finetune.config.load import load_config
from finetune.config.schema import Config, Mark, keys, marked
from finetune.data.cache import Cache
from finetune.data.encode import Recipe
from finetune.data.prepare import Prepared, prepare
from finetune.data.tokenizer import Chat
from finetune.errors import ConfigError
from finetune.files import write_json
from finetune.runs import receipt
from finetune.runs.receipt import differences

Row = list[dict[str, str]]
Receipt = dict[str, Any]


def row(*texts: str) -> Row:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, texts, strict=False)]


# Between 2,048 and 4,096 tokens: the Mac cuts the second turn of one row, and drops the other.
CUT = row("Hi", "Hello", "Hi", "Hello " * 2500)
DROPPED = row("Hi " * 2500, "Hello")
TRAIN = [*(row(f"Question {number}", f"Answer {number}") for number in range(4)), CUT, DROPPED]
VALIDATION = [row("How many?", "Nine"), row("How much?", "Ten")]


class Machine:
    """A folder with the data as it lies on one machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train = folder / "train.jsonl"
        self.validation = folder / "val.jsonl"
        write(self.train, TRAIN)
        write(self.validation, VALIDATION)

    def prepared(self, platform: str, *settings: str) -> tuple[Config, Prepared]:
        files = f"dataset.train_file={self.train}", f"dataset.validation_file={self.validation}"
        config, _ = load_config(platform, [*files, *settings])
        dataset = config.dataset
        length = config.model.max_seq_length
        recipe = Recipe(None, config.system_prompt, length, dataset.truncation, False, dataset.train_on)
        return config, prepare(config.dataset, recipe, config.training.packing, Cache(self.folder / "cache"), 0)

    def receipt(self, platform: str, *settings: str) -> Receipt:
        return receipt.make(*self.prepared(platform, *settings))


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows), encoding="utf-8")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def hashes(ours: Receipt, theirs: Receipt, *whats: str) -> list[str]:
    """The lines of hashes that differ."""
    pairs = [(what, theirs["must_agree"][what], ours["must_agree"][what]) for what in whats]
    assert all(len(then) == len(now) == 64 and then[:12] != now[:12] for _, then, now in pairs)
    return [f"{what}: {then[:12]} -> {now[:12]}" for what, then, now in pairs]


def test_the_mac_and_the_h100_agree_and_their_lengths_differ_by_design(machine: Machine) -> None:
    mac, h100 = machine.receipt("m4"), machine.receipt("h100")
    tokens = {
        platform: tuple(made["by_design"][f"train: tokens{loss}"] for loss in ("", " with loss"))
        for platform, made in (("m4", mac), ("h100", h100))
    }
    assert differences(ours=h100, theirs=mac) == (
        [],
        [
            'platform: "m4" -> "h100"',
            'model.attn_implementation: "sdpa" -> "flash_attention_2"',
            "model.max_seq_length: 2048 -> 4096",
            'quantization.storage: "expanded" -> "packed"',
            "training.per_device_train_batch_size: 1 -> 4",
            "training.per_device_eval_batch_size: 1 -> 4",
            "training.gradient_accumulation_steps: 16 -> 4",
            'training.optim: "adamw_torch" -> "paged_adamw_32bit"',
            'training.fused_lora: false -> "auto"',
            'training.fused_kernels: false -> "auto"',
            "training.eval_steps: 5 -> 100",
            "training.save_steps: 5 -> 500",
            "train: sequences: 1 -> 2",
            "train: rows cut: 1 -> 0",
            "train: rows dropped as too long: 1 -> 0",
            f"train: tokens: {tokens['m4'][0]} -> {tokens['h100'][0]}",
            f"train: tokens with loss: {tokens['m4'][1]} -> {tokens['h100'][1]}",
        ],
    )
    assert tokens["m4"][0] < 2048 < tokens["h100"][0]


def test_the_same_rows_in_another_place_are_the_same(
    machine: Machine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Machine(tmp_path_factory.mktemp("other"))
    assert differences(machine.receipt("h100"), other.receipt("h100")) == ([], [])


def of_split(name: str, *whats: str) -> list[str]:
    words = {
        "content": "conversations, in any order",
        "ids": "token ids before truncation, in file order",
        "labels": "labels before truncation, in file order",
    }
    return [f"{name}: {words[what]}" for what in whats]


ROW_CHANGES: dict[str, tuple[list[Row], list[str], list[str]]] = {
    "a word of a question": (
        [row("Answer 0", "Answer 0"), *TRAIN[1:]],
        [],
        of_split("train", "content", "ids"),
    ),
    "a word of a reply": (
        [row("Question 0", "Question 0"), *TRAIN[1:]],
        [],
        of_split("train", "content", "ids", "labels"),
    ),
    "a word that the Mac cuts off": (
        [*TRAIN[:4], row("Hi", "Hello", "Hi", "Hello " * 2499 + "you"), DROPPED],
        [],
        of_split("train", "content", "ids", "labels"),
    ),
    "a row": (TRAIN[1:], ["train: rows: 6 -> 5"], of_split("train", "content", "ids", "labels")),
    "a row that the Mac drops": (TRAIN[:5], ["train: rows: 6 -> 5"], of_split("train", "content", "ids", "labels")),
    "the order": (TRAIN[::-1], [], of_split("train", "ids", "labels")),
}


@pytest.mark.parametrize(("rows", "counts", "whats"), ROW_CHANGES.values(), ids=ROW_CHANGES.keys())
def test_a_change_of_the_rows_gives_exactly_its_lines(
    machine: Machine, rows: list[Row], counts: list[str], whats: list[str]
) -> None:
    theirs = machine.receipt("m4")
    write(machine.train, rows)
    ours = machine.receipt("h100")
    assert differences(ours, theirs)[0] == counts + hashes(ours, theirs, *whats)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("training.seed=43", "training.seed: 42 -> 43"),
        ("lora.r=32", "lora.r: 16 -> 32"),
        ("training.learning_rate=1.0e-4", "training.learning_rate: 0.0002 -> 0.0001"),
        ("training.gradient_accumulation_steps=8", "effective batch size: 16 -> 32"),
        ("training.max_steps=50", "training.max_steps: -1 -> 50"),
        ("quantization.bnb_4bit_use_double_quant=false", "quantization.bnb_4bit_use_double_quant: true -> false"),
        ("dataset.on_bad_row=drop", 'dataset.on_bad_row: "fail" -> "drop"'),
        ("model.revision=main", 'model.revision: "63a8b081895390a26e140280378bc85ec8bce07a" -> "main"'),
    ],
)
def test_a_change_of_a_shared_key_gives_its_line(machine: Machine, setting: str, line: str) -> None:
    assert differences(machine.receipt("h100", setting), machine.receipt("m4"))[0] == [line]


@pytest.mark.parametrize(
    "setting",
    [
        *("tracking.run_name=other", "output.dir=other", "tracking.report_to=none", "dataset.certificate=false"),
        *("training.logging_steps=3", "training.save_total_limit=1", "training.time_budget_hours=2"),
        *("dataset.sample_prompts=[Hi]", "dataset.validation_split=0.3"),  # the validation file decides
    ],
)
def test_what_changes_no_weight_is_not_compared(machine: Machine, setting: str) -> None:
    assert differences(machine.receipt("h100", setting), machine.receipt("h100")) == ([], [])


def test_another_system_prompt_changes_tokens_but_not_conversations(machine: Machine) -> None:
    theirs, ours = machine.receipt("m4"), machine.receipt("h100", "system_prompt=Be kind.")
    changed = of_split("train", "ids", "labels") + of_split("validation", "ids", "labels")
    wanted = [*hashes(ours, theirs, *changed), 'system_prompt: null -> "Be kind."']
    assert differences(ours, theirs)[0] == wanted


def test_other_turns_to_learn_change_the_labels_but_not_the_tokens(machine: Machine) -> None:
    theirs, ours = machine.receipt("h100"), machine.receipt("h100", "dataset.train_on=last")
    wanted = [*hashes(ours, theirs, *of_split("train", "labels")), 'dataset.train_on: "all" -> "last"']
    assert differences(ours, theirs)[0] == wanted
    masked = [*CUT[:1], CUT[1] | {"weight": 0}, *CUT[2:]]
    write(machine.train, [masked if messages is CUT else messages for messages in TRAIN])
    weighted = machine.receipt("h100")
    assert differences(weighted, theirs)[0] == hashes(weighted, theirs, *of_split("train", "labels"))
    assert (
        weighted["must_agree"]["train: labels before truncation, in file order"]
        == (ours["must_agree"]["train: labels before truncation, in file order"])
    )


def test_a_local_try_is_not_the_whole_run_and_is_the_same_try_elsewhere(machine: Machine) -> None:
    theirs, whole = machine.receipt("m4", "dataset.max_rows=3"), machine.receipt("h100")
    changed = of_split("train", "content", "ids", "labels")
    wanted = ["train: rows: 3 -> 6", *hashes(whole, theirs, *changed), "dataset.max_rows: 3 -> null"]
    assert differences(whole, theirs)[0] == wanted
    assert differences(machine.receipt("h100", "dataset.max_rows=3"), theirs)[0] == []


def test_another_share_held_out_gives_its_line_and_those_of_the_rows_that_moved(machine: Machine) -> None:
    write(machine.train, [row(f"Question {number}", f"Answer {number}") for number in range(60)])
    theirs = machine.receipt("m4", "dataset.validation_file=null")
    ours = machine.receipt("h100", "dataset.validation_file=null", "dataset.validation_split=0.3")
    rows = [made["must_agree"][f"{name}: rows"] for name in ("train", "validation") for made in (theirs, ours)]
    assert rows[0] + rows[2] == rows[1] + rows[3] == 60
    assert differences(ours, theirs)[0] == [
        f"train: rows: {rows[0]} -> {rows[1]}",
        *hashes(ours, theirs, *of_split("train", "content", "ids", "labels")),
        f"validation: rows: {rows[2]} -> {rows[3]}",
        *hashes(ours, theirs, *of_split("validation", "content", "ids", "labels")),
        "dataset.validation_split: 0.1 -> 0.3",
    ]


def test_a_validation_file_against_a_share_is_told_in_words(machine: Machine) -> None:
    write(machine.train, [row(f"Question {number}", f"Answer {number}") for number in range(60)])
    theirs, ours = machine.receipt("m4"), machine.receipt("m4", "dataset.validation_file=null")
    lines = differences(ours, theirs)[0]
    assert lines[-1] == 'dataset.validation_split: "a validation file" -> 0.1'


def test_the_number_of_checkpointed_layers_changes_no_weight_and_is_not_compared(machine: Machine) -> None:
    auto = machine.receipt("h100", "training.checkpointed_layers=auto")
    assert auto == machine.receipt("h100")


def test_another_tokenizer_or_template_gives_its_line(machine: Machine) -> None:
    config, prepared = machine.prepared("h100")
    other: Chat = replace(prepared.chat, fingerprint="ab" * 32)
    ours = receipt.make(config, replace(prepared, chat=other))
    theirs = receipt.make(config, prepared)
    assert differences(ours, theirs) == (hashes(ours, theirs, "tokenizer and template"), [])


def test_a_base_in_a_folder_is_named_without_its_path_or_revision(machine: Machine) -> None:
    (machine.folder / "my-base").mkdir()
    theirs, ours = machine.receipt("m4"), machine.receipt("h100", f"model.name={machine.folder / 'my-base'}")
    revision = theirs["must_agree"]["model.revision"]
    assert differences(ours, theirs)[0] == [
        f'model.name: "{MISTRAL}" -> "my-base"',
        f'model.revision: "{revision}" -> null',
    ]


def leaves() -> set[str]:
    every = list(keys())
    return {path for path in every if not any(other.startswith(f"{path}.") for other in every)}


def test_every_key_of_the_config_is_compared_or_left_out_on_purpose(machine: Machine) -> None:
    made = machine.receipt("h100")
    assert set(marked(Mark.BY_DESIGN)) | set(marked(Mark.NOT_COMPARED)) <= leaves()
    assert set(marked(Mark.BY_DESIGN)) <= made["by_design"].keys()
    by_content = {"dataset.train_file", "dataset.validation_file"}
    derived = {"model.name", "model.revision", "dataset.validation_split"}
    compared = leaves() & (made["must_agree"].keys() | made["by_design"].keys())
    assert leaves() - compared == set(marked(Mark.NOT_COMPARED)) - derived
    assert by_content <= set(marked(Mark.NOT_COMPARED))


# --- receipts that are none


def test_a_receipt_reads_back_as_it_was_made(machine: Machine) -> None:
    made = machine.receipt("m4")
    write_json(machine.folder / "receipt.json", made)
    assert receipt.read(machine.folder / "receipt.json") == made


def test_an_editor_may_put_a_byte_order_mark_before_it(machine: Machine) -> None:
    path = machine.folder / "receipt.json"
    path.write_text(json.dumps(machine.receipt("m4")), encoding="utf-8-sig")
    assert receipt.read(path) == machine.receipt("m4")


GOOD = {"schema_version": 1, "must_agree": {}, "by_design": {}}
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(missing_ok=True), "No such file or directory"),
    "a folder": (lambda path: path.mkdir(), "Is a directory"),
    "empty": (lambda path: path.write_text(""), "not JSON (Expecting value: line 1 column 1 (char 0))"),
    "cut off": (
        lambda path: path.write_text(json.dumps(GOOD)[:40]),
        "not JSON (Expecting property name enclosed in double quotes: line 1 column 41 (char 40))",
    ),
    "not text": (
        lambda path: path.write_bytes(b"\xff\xfe"),
        "not JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)",
    ),
    "nested without end": (
        lambda path: path.write_text("[" * 100_000),
        "not JSON (nested too deep)",
    ),
    "a list": (lambda path: path.write_text("[]"), "no receipt, for it has no schema_version"),
    "another file of the run": (lambda path: path.write_text("{}"), "no receipt, for it has no schema_version"),
    "without a part": (
        lambda path: path.write_text(json.dumps({**GOOD, "must_agree": None})),
        "must_agree is null, expected a section",
    ),
    "a part of another type": (
        lambda path: path.write_text(json.dumps({**GOOD, "by_design": ["\x1b[31m"]})),
        "by_design is ['\\x1b[31m'] (list), expected a section",
    ),
}


@pytest.mark.parametrize(("make", "found"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_receipt_is_a_config_error_that_says_so(
    tmp_path: Path, make: Callable[[Path], object], found: str
) -> None:
    path = tmp_path / "receipt.json"
    make(path)
    with pytest.raises(ConfigError) as refused:
        receipt.read(path)
    assert str(refused.value) == (
        f"config: 1 problem\n  --receipt {path}: {found}; name the receipt.json of a run's folder, copied whole"
    )


@pytest.mark.parametrize(("version", "shown"), [(2, "2 (whole number)"), ("1", "'1' (text)"), (None, "null")])
def test_a_receipt_of_another_schema_is_refused_with_both_versions(tmp_path: Path, version: Any, shown: str) -> None:
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps({**GOOD, "schema_version": version}))
    with pytest.raises(ConfigError) as refused:
        receipt.read(path)
    assert str(refused.value) == (
        f"config: 1 problem\n  --receipt {path}: schema_version is {shown}, expected 1; "
        "make both with the same version of this program"
    )


def test_a_line_that_stands_in_one_receipt_only_is_a_difference() -> None:
    ours = {**GOOD, "must_agree": {"lora.r": 16, "lora.new": None}}
    theirs = {**GOOD, "must_agree": {"lora.r": 16, "lora.old": 1}, "by_design": {"train: tokens": 9}}
    assert differences(ours, theirs) == (
        ["lora.new: absent -> null", "lora.old: 1 -> absent"],
        ["train: tokens: 9 -> absent"],
    )


def test_a_difference_is_one_line_that_cannot_write_to_the_terminal() -> None:
    theirs = {**GOOD, "must_agree": {"a\nb\x1b[31m": "\u202e\x9b1m\n"}}
    assert differences(GOOD, theirs)[0] == ['a\\nb\\x1b[31m: "\\u202e\\x9b1m\\n" -> absent']
