"""What several test files share: the project's root, and a tiny random Mistral that goes through the real code path."""

from __future__ import annotations

import copy
import functools
import gc
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from support.taught import Taught
    from support.training import Case

Ending = tuple[int, str, str]  # exit code, stdout, stderr
pytest_plugins = ["support.train_command"]  # the fixture train_file
ROOT = Path(__file__).resolve().parents[1]


# Files that share what takes long to make. They begin first, so that no process waits for them at the end.
TOGETHER = (
    ("tests/faults/",),
    ("tests/test_train.py", "tests/test_terminal.py", "tests/checks/test_mac.py"),
    ("tests/container/", "tests/results/test_chat.py", "tests/runs/test_adapter.py", "tests/scripts/test_chat.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    shared = sum(TOGETHER, ())
    items.sort(key=lambda item: not item.nodeid.startswith(shared))


def pytest_collection_finish() -> None:
    """Each training begins with a garbage collection: what was imported is left out of it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For pytest-xdist: a file stays in one process, and so do the files of a row of TOGETHER."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return next((row[0] for row in TOGETHER if file.startswith(row)), file)

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell's background jobs ignore SIGINT, and so would every program that these tests start and interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def read_once() -> Iterator[None]:
    """Mistral's tokenizer and the shipped configs take long to read: each process of the tests reads them once."""
    from finetune.config import yaml_file
    from finetune.data import tokenizer

    parsed = functools.cache(yaml_file.parse)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mistral_tokenizer", "_chat"):
            patch.setattr(tokenizer, name, functools.cache(getattr(tokenizer, name)))
        patch.setattr(yaml_file, "parse", lambda text, where: copy.deepcopy(parsed(text, where)))
        yield


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[Callable[[], None]], Ending]]:
    """How a command ends whose `main` this is: exit code, stdout and stderr."""
    from finetune import cli

    def running(main: Callable[[], None]) -> Ending:
        with pytest.raises(SystemExit) as stopped:
            cli.run(main)
        assert isinstance(stopped.value.code, int)
        shown = capsys.readouterr()
        return stopped.value.code, shown.out, shown.err

    handler = signal.getsignal(signal.SIGTERM)
    yield running
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random MistralForCausalLM of 2 layers and Mistral's vocabulary, so with its real tokenizer.

    Random weights would never come to an end: here </s> is the likeliest token everywhere, by a little.
    """
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-mistral"
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        sliding_window=None,
    )
    model = MistralForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.2  # a direction that all tokens share
        model.lm_head.weight[2, 0] = 0.5  # a logit of about 3, where others are within 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base model, made if it is not there."""
    folder = ROOT / "models" / "demo-135m"
    if not folder.is_dir():
        folder = tmp_path_factory.mktemp("demo-base") / "demo-135m"
        subprocess.run([sys.executable, ROOT / "scripts" / "make_demo_model.py", "--output", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def taught(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    """A tiny base and an adapter on it, which answer differently; shared by all, so a test changes a copy."""
    from finetune.data.tokenizer import load_chat
    from support.taught import make_taught

    return make_taught(tiny_mistral, load_chat(None), tmp_path_factory.mktemp("taught"))


@pytest.fixture
def hub_cache(tiny_mistral: Path, tmp_path: Path) -> Path:
    """A Hub's cache that holds a Mistral as `hf download` leaves it, sharded as the real one is.

    No mark says which other files the Hub does not have.
    """
    from transformers import MistralForCausalLM

    from finetune.config.base_model import MISTRAL

    cache, revision = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--{MISTRAL.replace('/', '--')}"
    MistralForCausalLM.from_pretrained(tiny_mistral).save_pretrained(
        repository / "snapshots" / revision, max_shard_size="10MB"
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision, encoding="utf-8")
    return cache


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """40 short conversations, each different."""
    path = tmp_path / "train.jsonl"
    rows = []
    for number in range(40):
        reply = f"It is {number + 1}, " + "one more than before, " * (number % 5) + "that is all."
        question = {"role": "user", "content": f"What is {number} plus one?"}
        rows.append({"messages": [question, {"role": "assistant", "content": reply}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from finetune.data.tokenizer import load_chat
    from finetune.model.load import make_tokenizer

    return make_tokenizer(load_chat(None), "right")


@pytest.fixture
def case(tiny_mistral: Path, conversations: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Case:
    from support.training import Case

    return Case(tiny_mistral, conversations, tmp_path, tokenizer)
