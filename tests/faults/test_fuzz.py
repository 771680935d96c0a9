"""Whatever bytes a config or a data file holds: it is read, or it is a problem that says where; never a traceback."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetune.config.load import load_config
from finetune.config.yaml_file import PLAIN
from finetune.data.encode import Encoder, Recipe
from finetune.errors import ConfigError
from support.damaged import damaged
from support.harness import COUNTS, ENVIRONMENT, NIGHTLY, ROOT
from support.inputs import LENGTH, check_config, check_jsonl


def fuzz(examples: int, nightly: int) -> settings:
    """So many inputs, each read within 5 s."""
    count = nightly if NIGHTLY else examples
    return settings(max_examples=count, deadline=5000, suppress_health_check=list(HealthCheck), database=None)


SHIPPED = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").glob("*.yaml"))]
TREES: list[dict[str, Any]] = [yaml.safe_load(text) for text in SHIPPED]
LINES = sorted({line for text in SHIPPED for line in text.splitlines()})
KEYS = sorted({key for tree in TREES for section in tree.values() if isinstance(section, dict) for key in section})
numbers = st.one_of(st.integers(), st.integers(0, 8), st.floats(), st.sampled_from([2**63, 10**400, -(2**63), 1e308]))
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20), st.dates(), st.binary(max_size=4))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


@st.composite
def trees(draw: st.DrawFn) -> bytes:
    """A shipped config with some keys set to anything, and perhaps a key that is none."""
    tree = json.loads(json.dumps(draw(st.sampled_from(TREES))))
    for _ in range(draw(st.integers(1, 3))):
        section = draw(st.sampled_from(sorted(tree)))
        if isinstance(tree[section], dict) and draw(st.booleans()):
            tree[section][draw(st.sampled_from(KEYS) | st.text(max_size=8))] = draw(values)
        else:
            tree[section] = draw(values)
    return yaml.safe_dump(tree, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """Lines of the shipped configs, some bytes of them changed."""
    text = "\n".join(draw(st.lists(st.sampled_from(LINES), max_size=12))).encode()
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.binary(max_size=4)) + text[place + draw(st.integers(0, 3)) :]
    return text


@fuzz(200, nightly=5000)
@given(st.one_of(trees(), texts(), st.binary(max_size=200)))
@example(b"model: {name: ~nobody}")
@example(b"\xff\xfe")
@example(b"output: {dir: '\\0'}")
@example(b'output: {dir: "\\0"}')
@example(b'dataset: {train_file: "\\0"}')
@example(b'model: {name: "\\0"}')
@example(b'tracking: {run_name: "\\e[2J"}')
def test_any_bytes_of_a_config_are_a_config_or_a_config_error_that_prints(content: bytes) -> None:
    COUNTS["inputs"] += 1
    with tempfile.TemporaryDirectory() as folder:
        check_config(content, Path(folder) / "config.yaml")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(Recipe(None, None, LENGTH, True, True))


lines = st.lists(st.one_of(damaged(), st.binary(max_size=60)), max_size=4).map(b"\n".join)


@fuzz(500, nightly=50_000)
@given(content=lines)
def test_any_bytes_of_jsonl_are_rows_as_mistral_common_has_them_or_bad_rows(encoder: Encoder, content: bytes) -> None:
    COUNTS["inputs"] += 1
    check_jsonl(content, encoder)


# --- bytes that grow by what they reach


SAMPLE = (ROOT / "data" / "sample" / "train.jsonl").read_bytes().splitlines(keepends=True)
SEEDS = {
    "config": [yaml.safe_dump(tree).encode() for tree in TREES],
    "jsonl": [b"".join(SAMPLE[:2]), SAMPLE[2]],
    "planted": [],
}
RUNS = {"config": 2000, "jsonl": 50_000} if NIGHTLY else {"config": 50, "jsonl": 1000}


def guided(name: str, folder: Path, runs: int) -> tuple[subprocess.CompletedProcess[str], int]:
    """How guided.py ended, and how many inputs it tried."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is made for Linux on x86-64 only")
    folder.mkdir()
    for number, seed in enumerate(SEEDS[name]):
        (folder / str(number)).write_bytes(seed)
    line = [sys.executable, str(ROOT / "tests" / "support" / "guided.py"), name, str(folder), str(runs)]
    done = subprocess.run(line, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
    tried = re.search(r"^stat::number_of_executed_units: (\d+)$", done.stderr, re.MULTILINE)
    assert tried, done.stderr
    return done, int(tried[1])


@pytest.mark.parametrize("name", RUNS)
def test_no_bytes_that_are_guided_by_coverage_break_a_reader(tmp_path: Path, name: str) -> None:
    done, tried = guided(name, tmp_path / name, RUNS[name])
    COUNTS["inputs"] += tried
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert tried >= RUNS[name]
    assert re.search(r"cov: \d{3}", done.stderr)  # it saw into the reader: what it saw nothing of has fewer than ten


def test_guided_bytes_find_a_crash_that_lies_behind_four_comparisons(tmp_path: Path) -> None:
    done, _ = guided("planted", tmp_path / "planted", 500_000)
    assert (done.returncode, "RuntimeError: the planted crash" in done.stdout + done.stderr) == (77, True)
    assert [path.read_bytes()[:4] for path in (tmp_path / "planted").glob("crash-*")] == [b"Lost"]


# --- bombs


def laughs() -> bytes:
    levels = [b"a0: &a0 [lol, lol]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]".encode() for n in range(1, 30))]
    return b"\n".join(levels)


BOMBS = {
    "50 MB": (lambda: b"a: 1\n" * 10_000_000, "{path}: 50000000 bytes is too large; the limit is 1000000"),
    "aliases of aliases": (laughs, "{path}:2: " + PLAIN),
    "lists 3,000 deep": (lambda: b"a: " + b"[" * 3000, "{path}:1: " + PLAIN),
    "mappings 3,000 deep": (lambda: b"{a: " * 3000, "{path}:1: " + PLAIN),
    "sequences 3,000 deep": (lambda: b"- " * 3000, "{path}:1: " + PLAIN),
    "keys 2,000 deep": (lambda: b"? " * 2000, "{path}:1: " + PLAIN),
    "an object to make": (lambda: b"a: !!python/object/apply:os.system [ls]", "{path}:1: " + PLAIN),
}


@pytest.mark.parametrize(("make", "said"), BOMBS.values(), ids=BOMBS.keys())
def test_a_config_made_to_take_memory_or_time_is_refused_at_once(tmp_path: Path, make: Any, said: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(make())
    started = time.process_time()
    with pytest.raises(ConfigError) as refused:
        load_config(str(path))
    assert time.process_time() - started < 2
    assert refused.value.problems == (said.format(path=path),)
