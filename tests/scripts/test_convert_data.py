"""The command that converts a data set: what it prints, its flags and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cli import command
from finetune.files import ROOT
from support.data_page import FILES

SCRIPT = ROOT / "scripts" / "convert_data.py"
Run = Callable[..., tuple[int, str, str]]


def test_it_says_what_it_recognized_changed_and_dropped_and_ends_with_the_dry_run(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "my rows.jsonl"
    assert run(FILES / "sharegpt.json", output) == (
        0,
        f"recognized: {FILES / 'sharegpt.json'} is a JSON array\n"
        "          4  ShareGPT (conversations/from/value)\n"
        "changed\n"
        "          1  last message dropped: it has no answer: row 2\n"
        "          1  system prompt became the system message: row 4\n"
        "ignored keys\n"
        "          3  id: rows 1, 2, 4\n"
        "dropped\n"
        "          1  begins with the assistant, expected user: row 3\n"
        f"written: 3 conversations to {output}\n"
        f"next: {command('src/train.py')} --config h100 --set 'dataset.train_file={output}' --dry-run\n",
        "",
    )


def test_json_is_one_document_with_the_same_account(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "made.jsonl"
    code, out, err = run(FILES / "kto.jsonl", output, "--json")
    assert (code, err.splitlines()[0]) == (0, f"recognized: {FILES / 'kto.jsonl'} is JSON Lines")
    assert json.loads(out) == {
        "recognized": "JSON Lines",
        "read": 2,
        "written": {"train": {"path": str(output), "rows": 1}},
        "formats": {"KTO (prompt/completion/label)": {"count": 2, "first": [1, 2]}},
        "changed": {"label removed: it marks the answer as good": {"count": 1, "first": [1]}},
        "unread": {},
        "dropped": {"label marks the answer as bad": {"count": 1, "first": [2]}},
        "next": f"{command('src/train.py')} --config h100 --set dataset.train_file={output} --dry-run",
    }


def test_the_flags_reach_the_conversion(run: Run, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"Q": f"{row}", "A": "B", "source": f"{row}"}) + "\n" for row in range(3))
    (tmp_path / "rows.jsonl").write_text(rows)
    flags = ("--columns", "prompt=Q,completion=A", "--system", "Be kind.", "--split-by", "source", "--merge-turns")
    code, out, err = run(tmp_path / "rows.jsonl", tmp_path / "made.jsonl", *flags)
    assert (code, err) == (0, "")
    made = [json.loads(line) for name in ("made", "val") for line in (tmp_path / f"{name}.jsonl").open()]
    assert sorted(row["messages"][1]["content"] for row in made) == ["0", "1", "2"]
    assert {row["messages"][0]["content"] for row in made} == {"Be kind."}
    assert out.splitlines()[-2:] == [
        f"written: 1 conversation to {tmp_path / 'val.jsonl'}",
        f"next: {command('src/train.py')} --config h100 --set dataset.train_file={tmp_path / 'made.jsonl'} "
        f"--set dataset.validation_file={tmp_path / 'val.jsonl'} --dry-run",
    ]


COLUMNS = "expected pairs, for example prompt=Q,completion=A"


@pytest.mark.parametrize(
    ("output", "flags", "message"),
    [
        *(
            ("made.jsonl", ("--columns", text), f"--columns {text}: {COLUMNS}")
            for text in ("prompt", "prompt=", "prompt=Q,,=A")
        ),
        ("val.jsonl", ("--split-by", "prompt"), "OUT is FILE, which --split-by writes too; name it train.jsonl"),
    ],
)
def test_wrong_flags_are_exit_2(run: Run, tmp_path: Path, output: str, flags: tuple[str, str], message: str) -> None:
    path = tmp_path / output
    message = message.replace("FILE", str(path))
    assert run(FILES / "kto.jsonl", path, *flags) == (2, "", f"config: 1 problem\n  {message}\n")


def test_a_file_that_is_there_is_exit_2_and_one_without_conversations_exit_4(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "made.jsonl"
    code, _, err = run(FILES / "text.jsonl", output)
    reason = "2 of 2 rows dropped: plain text: it does not say who speaks"
    assert (code, err) == (4, f"no conversation for {output}: {reason}; docs/data.md has the formats\n")
    output.touch()
    code, _, err = run(FILES / "kto.jsonl", output)
    assert (code, err) == (
        2,
        f"config: 1 problem\n  {output} already exists, and nothing is overwritten; name another file\n",
    )


@pytest.mark.parametrize("flags", [("--columns", "prompt=no,completion=no"), ("--split-by", "no")])
def test_a_refused_conversion_leaves_no_file(run: Run, tmp_path: Path, flags: tuple[str, str]) -> None:
    assert run(FILES / "questions.csv", tmp_path / "made.jsonl", *flags)[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_more_than_twenty_reasons_are_counted(run: Run, tmp_path: Path) -> None:
    rows = [{f"\x1b{row}": 1} for row in range(25)] + [{"prompt": "A", "completion": "B"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, out, _ = run(tmp_path / "rows.jsonl", tmp_path / "made.jsonl")
    listed = out.split("dropped\n")[1].splitlines()
    assert listed[0] == r"          1  no known format (keys '\x1b0'): line 1"
    assert listed[20] == "             and 5 more"


def test_parquet_and_folders_are_converted_without_torch(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"prompt": "A", "completion": "B"}\n')
    arguments = ["convert_data.py", str(tmp_path / "set"), str(tmp_path / "made.jsonl")]
    code = (
        f"import sys, runpy; sys.argv = {arguments!r}\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "assert 'datasets' in sys.modules and 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made.jsonl").is_file()
