"""report.html and the comparison page: their contents, in a real browser, and with hostile text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from finetune.cli import PYTHON
from finetune.config.base_model import MISTRAL
from finetune.config.load import ROOT
from finetune.results.report import page as report_page
from support.browser import PROGRAM, Browser
from support.pages import HOSTILE, Reader
from support.run_folders import SAMPLES, make_run, manifest, rows, start, without_end

SCRIPT = ROOT / "scripts" / "make_report.py"


def hostile(folder: Path) -> Path:
    """A run whose every free text is hostile."""
    data = {"train": {"path": HOSTILE, "sha256": HOSTILE, "rows": 3}}
    bad = {"train": rows(100, dropped_bad=[{"file": HOSTILE, "line": 4, "found": HOSTILE}]), "validation": rows(10)}
    samples = [{"prompt": HOSTILE, "base": HOSTILE, "tuned": HOSTILE}]
    test = {"status": "fail", "checks": [{"name": HOSTILE, "status": HOSTILE, "detail": HOSTILE}]}
    texts = {"data": data, "rows": bad, "error": HOSTILE, "self_test": test, "skipped_checks": [HOSTILE]}
    names = {"versions": {HOSTILE: HOSTILE}, "hardware": {HOSTILE: HOSTILE}, "base_model": {"name": HOSTILE}}
    ends = [start((0, 20), (0, 25), HOSTILE)]
    run = make_run(folder, without_end("failed", *ends, **texts, **names))
    (run / "samples.jsonl").write_text(json.dumps({"step": HOSTILE, "samples": samples}) * 1 + "\n", encoding="utf-8")
    (run / "config.yaml").write_text(f"model:\n  name: {json.dumps(HOSTILE)}\n", encoding="utf-8")
    return run


# --- contents


def test_a_complete_run_shows_the_verdict_first_and_then_all_parts(complete: Path) -> None:
    page = Reader(report_page.write(complete))
    heads = ("Verdict", "Base and tuned answers", "Curves", "Data", "Plan and actual")
    assert page.order(*heads, "Self-test of the adapter", "Config and versions")
    assert page.order(
        "A LoRA adapter for", "Yes: 38% less held-out loss", "Yes, as far as tested", "Base and tuned answers"
    )
    assert page.order("How do I make tea?", SAMPLES[0]["base"], SAMPLES[0]["tuned"], "(nothing)")
    for caption in ("Loss, nats per token", "Learning rate", "Gradient norm", "Tokens per second", "Peak memory, GiB"):
        assert caption in page.text
    assert page.order(
        "training held out", "conversations 100 10", "of them with loss 60% 60%", "truncated at the length limit 3 0"
    )
    memory = "peak memory, GiB (plan) 11.50 11.90 +3%"
    assert page.order("optimizer steps 40 40 same", memory, "minutes 30.0 40.0 +33%")
    assert page.order("killed steps 0 to 25 2026-03-01 12:00 UTC, 20 min", "complete steps 20 to 40")
    assert page.order("pass finite 28 of 28 tensors", "the same bits each time", "abc1234")
    assert page.order("abc1234", "torch 2.10.0, peft 0.21.2", "config.yaml")


def test_with_several_files_each_shows_its_weight_and_a_bad_row_its_file(tmp_path: Path) -> None:
    entry = {"path": "/data/a.jsonl", "sha256": "0123456789abcdef" * 4, "rows": 90}
    files = {"train": entry, "train 2": {**entry, "path": "/data/b.jsonl", "weight": 1.5, "rows": 1200}}
    bad = [{"file": "/data/b.jsonl", "line": 7, "found": "not JSON"}]
    counts = {
        "train": rows(100, left_out=4, repeated=50, dropped_bad=bad, dropped_duplicates=2),
        "validation": rows(10, opening_leaks=3),
    }
    page = Reader(report_page.write(make_run(tmp_path / "run", manifest(data=files, rows=counts))))
    assert page.order(
        "dropped: bad rows 1 0",
        "dropped: duplicates of another row 2 0",
        "omitted because of a file's weight 4 0",
        "repeated because of a file's weight 50 0",
    )
    assert "same opening as a training row 0 3" in page.text
    assert page.order("train /data/a.jsonl 90 rows, sha256 0123456789abcdef", "train 2 /data/b.jsonl")
    assert page.order("/data/b.jsonl 1,200 rows, weight 1.5, sha256", "/data/b.jsonl, line 7: not JSON")


def test_a_bad_row_of_an_older_manifest_is_shown_without_its_file(tmp_path: Path) -> None:
    counts = {"train": rows(100, dropped_bad=[{"line": 7, "found": "not JSON"}]), "validation": rows(10)}
    page = Reader(report_page.write(make_run(tmp_path / "run", manifest(rows=counts))))
    assert "Dropped as bad line 7: not JSON" in page.text


def test_the_page_has_one_link_and_no_scripts_or_requests(complete: Path) -> None:
    page = Reader(report_page.write(complete))
    assert page.links == [f"https://huggingface.co/{MISTRAL}"]
    assert not page.tags & {"script", "link", "iframe", "img", "object", "form", "base"}
    assert "default-src 'none'; style-src 'unsafe-inline'" in (complete / "report.html").read_text(encoding="utf-8")
    assert len(page.ids) == len(set(page.ids)) > 20


def test_each_chart_has_a_description(complete: Path) -> None:
    text = report_page.write(complete).read_text(encoding="utf-8")
    svgs = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert len(svgs) == 6
    described = {}
    for svg in svgs:
        title, description = svg[0], svg[1]
        assert svg.get("role") == "img" and svg.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        described[title.text] = description.text
    assert described["Training and held-out loss"] == (
        "Training loss: from 3.95 at step 1 to 2 at step 40, least 2, most 3.95. Held-out loss: from 4 at step 0 to "
        "2.6 at step 40, least 2.5, most 4. Best held-out loss 2.5 at step 30."
    )
    assert described["Lengths of the training conversations"] == (
        "100 conversations by length before cutting: half have up to 140 tokens, 95 % up to 390, the longest 9,000."
    )


def test_missing_parts_of_a_run_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", {"status": "failed", "error": "no module named x"})
    (folder / "metrics.jsonl").unlink()
    (folder / "config.yaml").unlink()
    page = Reader(report_page.write(folder))
    assert page.order("This run failed At step 0. no module named x", "Verdict", "an unknown base", "Not known yet")
    assert page.order("None: no prompt was answered by both models.", "Nothing was logged yet.", "Not run.")
    assert page.order("optimizer steps not known 0", "minutes not known not known", "not a git clone")


def test_a_starts_rehearsal_changes_and_quarantined_checkpoints_are_shown(tmp_path: Path) -> None:
    rehearsal = {"peak_memory_gib": 11.8, "capacity_gib": 79.1, "hours": 0.6, "tokens_per_second": 5000.0}
    first = start((0, 20), (0, 25), "killed") | {"rehearsal": rehearsal}
    noted = {"changed": ["lora.r: 16 -> 8"], "set_aside": ["checkpoint-25 <cut>"]}
    second = start((35, 55), (20, 40), "complete") | noted
    plan = manifest()["plan"] | {"hours": None}
    page = Reader(report_page.write(make_run(tmp_path / "run", manifest(starts=[first, second], plan=plan))))
    assert page.order("peak memory, GiB (rehearsal) 11.80 11.90 +1%", "minutes 36.0 40.0 +11%")
    assert page.order("steps 20 to 40", "resumed with a change: lora.r: 16 -> 8", "checkpoint-25 <cut>")
    assert page.order("From step 20 on, trained with changes: lora.r: 16 -> 8.")


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_is_not_complete_says_so_before_the_verdict(tmp_path: Path, status: str) -> None:
    end = "stopped" if status == "interrupted" else "failed"
    content = without_end(status, start((0, 20), (0, 25), end), error="the loss is not a number")
    page = Reader(report_page.write(make_run(tmp_path / "run", content, steps=25)))
    first = {"interrupted": "This run is not finished", "failed": "This run failed"}[status]
    assert page.order(first, f"{PYTHON} src/train.py --config {tmp_path}/run/config.yaml", "Verdict")


# --- hostile text


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    run = hostile(tmp_path / "run")
    for path in (report_page.write(run), report_page.write_comparison(run, run)):
        page = Reader(path)
        assert not page.tags & {"script", "img", "b"}
        assert (page.links, page.events) == ([], [])
        assert not {"\u202e", "\u2066", "\x1b"} & set(path.read_text(encoding="utf-8"))
    page = Reader(report_page.write(run))
    shown = "<script>document.title='taken'</script><img src=x onerror=alert(1)></svg>"
    assert page.text.count(shown) >= 12
    assert "\\u202edetrever\\u2066 {{ 7*7 }} $\\frac{1}{2}$ \\x1b[31m" in page.text


def test_the_same_run_gives_the_same_bytes(complete: Path) -> None:
    assert report_page.write(complete).read_bytes() == report_page.write(complete).read_bytes()
    assert [path.name for path in complete.glob("*.partial")] == []


# --- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("no chromium: apt-get install chromium")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def pages(folder: Path) -> dict[str, Path]:
    """A page of each kind."""
    done = make_run(folder / "done", manifest())
    events = [{"step": step, "eval_loss": 2.0, "samples": SAMPLES} for step in (10, 30)]
    (done / "samples.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    stopped = without_end("interrupted", start((0, 20), (0, 25), "stopped"))
    failed = without_end("failed", start((0, 20), (0, 25), "failed"), error="step 25: the loss is not a number")
    evil = hostile(folder / "evil")
    return {
        "complete": report_page.write(done),
        "interrupted": report_page.write(make_run(folder / "stopped", stopped, steps=25)),
        "failed": report_page.write(make_run(folder / "failed", failed, steps=25)),
        "hostile": report_page.write(evil),
        "two": report_page.write_comparison(done, evil),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return pages(tmp_path_factory.mktemp("pages"))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["complete", "interrupted", "failed", "hostile", "two"])
def test_a_browser_shows_every_page_without_errors_requests_or_unreadable_text(
    browser: Browser, made: dict[str, Path], kind: str, width: int, theme: str
) -> None:
    seen = browser.see(made[kind], width, theme)
    assert seen.complaints == []
    assert seen.requests == [made[kind].as_uri()]
    assert seen.scroll_width <= seen.client_width
    assert len(seen.texts) > 50
    assert [text for text in seen.texts if text["ratio"] < 4.5] == []
    assert [text for text in seen.texts if text["pixels"] < 10] == []


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_script_writes_the_page_and_prints_its_path(complete: Path, tmp_path: Path) -> None:
    done = script(complete)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{complete}/report.html\n", "")
    other = make_run(tmp_path / "other", manifest())
    done = script(complete, other, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"report": f"{complete}/compare-other.html"}


def test_a_missing_folder_exits_with_2_and_one_message(tmp_path: Path) -> None:
    done = script(tmp_path / "absent")
    text = f"config: 1 problem\n  {tmp_path}/absent: no such folder; name a run's folder, such as adapters/RUN\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", text)


def test_the_script_imports_no_torch(complete: Path) -> None:
    code = f"import runpy, sys; sys.argv = ['make_report.py', {str(complete)!r}]\n"
    code += (
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nexcept SystemExit as end: assert end.code == 0\n"
    )
    code += "print(*sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.stdout, done.stderr) == (f"{complete}/report.html\n\n", "")
