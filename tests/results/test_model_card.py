"""The model card: a header that the Hub's own parser takes, the manifest's facts, nothing that a name can break."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from markdown_it import MarkdownIt
from transformers import AutoTokenizer

from finetune.config.base_model import MISTRAL
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.data.tokenizer import Chat, load_chat
from finetune.model.load import make_tokenizer
from finetune.results.model_card import hub_base, metadata, model_card
from finetune.results.self_test import SelfCheck, SelfTest
from finetune.wording import clean

REVISION = "63a8b081895390a26e140280378bc85ec8bce07a"
MANIFEST: dict[str, Any] = {
    "status": "complete",
    "config_sha256": "c" * 64,
    "data": {"train": {"path": "data/processed/train.jsonl", "sha256": "d" * 64, "rows": 1200}},
    "tokens": {
        "train": {"input_ids": "1" * 64, "labels": "2" * 64, "rows": 1080, "total": 500_000, "supervised": 200_000},
        "validation": {"input_ids": "3" * 64, "labels": "4" * 64, "rows": 120, "total": 50_000, "supervised": 20_000},
    },
    "base_model": {"name": MISTRAL, "revision": REVISION},
    "init_adapter": {"folder": None, "sha256": None},
    "versions": {
        "torch": "2.10.0+cu128",
        "transformers": "5.23.0",
        "peft": "0.21.2",
        "accelerate": "1.15.0",
        "bitsandbytes": "0.50.2",
    },
    "hardware": {"platform": "h100", "gpu": "NVIDIA H100 80GB HBM3"},
    "git_commit": "abc123",
    "same_bits": "sdpa over packed documents: different bits each time in attention's output",
    "skipped_checks": [],
    "fused_kernels": True,
    "fused_lora": False,
    "checkpointed_layers": 2,
    "starts": [],
    "steps": 1920,
    "train_loss": 1.1,
    "eval_loss_before": 2.34567,
    "eval_loss": 1.23456,
    "best_step": 1500,
    "stopped_early": False,
    "tokens_per_second": 5400.4,
    "peak_memory_gib": 12.94,
    "seconds": 12_600.0,
    "adapter_sha256": "a" * 64,
    "samples": [{"prompt": "private question", "base": "one", "tuned": "two"}],
}
HOSTILE = [
    "a `tick` and | a bar",
    "ends with `",
    "_a_ *b* ~~c~~ &amp; <b>d</b> ![e](f)",
    "---\nlicense: mit\n---\n# Owned",
    "`code` ``more`` <script>alert(1)</script>",
    "| a | b |\n|---|---|",
    "```\n[link](javascript:alert(1))\n```",
    "\"'; import os #\\",
    "{{ card_data }} {% raw %}",
    "\x1b[31m\u202e",
]


@pytest.fixture
def h100() -> Config:
    return load_config("h100")[0]


@pytest.fixture
def local(tmp_path: Path) -> Config:
    """A base in a folder, which says nothing of where it came from."""
    return load_config("cpu", [f"model.name={tmp_path}"])[0]


def header(card: str) -> dict[str, Any]:
    found = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert isinstance(found, dict)
    return found


# What the Hub reads ---------------------------------------------------------------------------------------------------


def test_the_header_is_what_the_hub_asks_of_an_adapter(h100: Config) -> None:
    assert header(model_card(h100, MANIFEST)) == {
        "base_model": MISTRAL,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "mistral", "trl", "sft"],
        "model-index": [
            {
                "name": "mistral-7b-qlora-h100",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {
                            "name": "held-out conversations",
                            "type": "json",
                            "split": "validation",
                            "args": {"conversations": 120},
                        },
                        "metrics": [{"type": "loss", "value": 1.23456, "name": "eval_loss"}],
                    }
                ],
            }
        ],
    }


def test_the_hubs_own_parser_reads_back_what_was_written(h100: Config) -> None:
    parsed = ModelCard(model_card(h100, MANIFEST), ignore_metadata_errors=False).data
    assert isinstance(parsed, ModelCardData)
    assert parsed.to_dict() == metadata(h100, MANIFEST).to_dict()
    [result] = parsed.eval_results
    assert isinstance(result, EvalResult)
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("loss", 1.23456, "validation")


def test_of_an_unknown_base_neither_id_nor_license_is_invented(local: Config) -> None:
    written = header(model_card(local, MANIFEST | {"base_model": {"name": "folder", "revision": None}}))
    assert {"base_model", "base_model_relation", "license", "language", "datasets"} & written.keys() == set()


@pytest.mark.parametrize(
    ("note", "revision", "base"),
    [
        (f"{REVISION}\netag\n1700000000.0\n", REVISION, MISTRAL),
        (f"{REVISION}\netag\n1700000000.0\n", None, None),
        ("0" * 40 + "\netag\n", REVISION, None),
        ("", REVISION, None),
    ],
    ids=["the pinned commit", "nothing pinned", "another commit", "an empty note"],
)
def test_a_folder_is_mistral_where_the_download_noted_the_pinned_commit(
    note: str, revision: str | None, base: str | None, local: Config
) -> None:
    config = local.changed("model", revision=revision)
    assert hub_base(config) is None
    notes = Path(local.model.name) / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text(note, encoding="utf-8")
    assert hub_base(config) == base


# What a person reads --------------------------------------------------------------------------------------------------


def body(card: str) -> str:
    return card.split("\n---\n", 1)[1]


def test_the_card_says_that_loss_was_on_last_answers_only(h100: Config) -> None:
    text = body(model_card(h100.changed("dataset", train_on="last"), MANIFEST))
    assert "and only on what the assistant says last in each conversation.\n" in text
    assert "| dataset.train_on | `last` |" in text


def test_the_card_says_with_which_adapter_the_training_began_and_not_where_that_lay(h100: Config) -> None:
    text = body(model_card(h100, MANIFEST | {"init_adapter": {"folder": "/home/me/secret", "sha256": "0f0f"}}))
    assert "It began with another adapter, whose weights have the sha256 `0f0f`.\n" in text
    assert "/home/me/secret" not in text
    assert "It began with" not in body(model_card(h100, MANIFEST))


def test_the_card_says_what_the_manifest_says(h100: Config) -> None:
    text = body(model_card(h100, MANIFEST))
    for line in (
        "# mistral-7b-qlora-h100",
        f"A LoRA adapter for [{MISTRAL}](https://huggingface.co/{MISTRAL}) at commit `{REVISION}`, trained by QLoRA on "
        "1,080 conversations. The base was held in 4 bits and stayed frozen; only the adapter was trained, and only on "
        "what the assistant says.",
        "| before training | 2.3457 |",
        "| this adapter (step 1500 of 1920) | 1.2346 |",
        "- train: 1,080 conversations, 500,000 tokens, 200,000 of them with loss; "
        f"file `train.jsonl`, sha256 `{'d' * 64}`",
        "- validation: 120 conversations, 50,000 tokens, 20,000 of them with loss; split off",
        "| lora.r | `16` |",
        "| lora.target_modules | `q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj` |",
        "| training.learning_rate | `0.0002` |",
        "| sequences an optimizer step | 16 |",
        "- 1,920 steps in 3.50 hours; 5,400 tokens/s, at most 12.9 GiB",
        "- hardware: `platform h100, gpu NVIDIA H100 80GB HBM3`",
        "- steps: fused kernels",
        "- repeated on that hardware before the run: "
        "`sdpa over packed documents: different bits each time in attention's output`",
        "- versions: `torch 2.10.0+cu128, transformers 5.23.0, peft 0.21.2, accelerate 1.15.0, bitsandbytes 0.50.2`",
        f"- adapter sha256 `{'a' * 64}`",
    ):
        assert f"\n{line}\n" in text, line
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert titles == ["Use", "Results", "Training data", "Training", "Intended use and limits"]


def test_no_conversation_and_no_answer_stands_in_the_card(h100: Config) -> None:
    assert "private question" not in model_card(h100, MANIFEST)


def test_what_was_not_measured_or_known_is_said_so(h100: Config) -> None:
    unknown = {"eval_loss_before": None, "git_commit": None, "same_bits": None}
    text = model_card(h100, MANIFEST | unknown | {"stopped_early": True})
    assert "| before training | not measured |\n" in text
    assert "- program's commit: `not known`\n" in text
    assert "- 1,920 steps in 3.50 hours, stopped early; " in text
    assert "loaded again and tested" not in text
    assert "repeated" not in text


def test_the_self_tests_verdict_is_in_the_card_where_there_is_one(h100: Config) -> None:
    finite, ended = SelfCheck("finite", "pass", "448 tensors"), SelfCheck("answers_end", "pass", "4 of 4")
    text = model_card(h100, MANIFEST | {"self_test": SelfTest((finite, ended)).as_dict()})
    verdict = "\n\nThe saved adapter was loaded again and tested: `pass`.\n\n"
    assert f"{verdict}- `finite`: `448 tensors`\n- `answers_end`: `4 of 4`\n\n## Training data\n" in text


def test_the_card_of_a_best_adapter_says_that_the_training_was_not_finished(h100: Config) -> None:
    so_far = MANIFEST | {"status": "interrupted", "eval_loss": 1.5, "best_step": 1000}
    for name in ("steps", "seconds", "tokens_per_second", "peak_memory_gib", "eval_loss_before", "stopped_early"):
        del so_far[name]
    text = body(model_card(h100, so_far))
    assert (
        "\n\n**The training was not finished when this was written.** This adapter, of step 1,000, had the lowest "
        "eval_loss so far; it was not loaded again and tested.\n\n## Use\n"
    ) in text
    assert "\nadapter = 'mistral-7b-qlora-h100/checkpoints/best'  # this folder\n" in text
    assert "\n|---|---|\n| this adapter (step 1000) | 1.5000 |\n\n" in text
    assert "not finished" not in body(model_card(h100, MANIFEST))


@pytest.mark.parametrize("status, mark", [("fail", "failed"), ("warn", "warning")])
def test_the_card_says_which_check_failed_or_warns(h100: Config, status: Any, mark: str) -> None:
    finite, ended = SelfCheck("finite", "pass", "448 tensors"), SelfCheck("answers_end", status, "2 of 4")
    text = model_card(h100, MANIFEST | {"self_test": SelfTest((finite, ended)).as_dict()})
    verdict = f"\n\nThe saved adapter was loaded again and tested: `{status}`.\n\n"
    assert f"{verdict}- `finite`: `448 tensors`\n- **{mark}**: `answers_end`: `2 of 4`\n\n" in text


def test_the_code_names_base_commit_dtype_and_how_the_base_was_quantized(h100: Config, local: Config) -> None:
    text = model_card(h100, MANIFEST)
    assert (
        f"    base, revision='{REVISION}', dtype=torch.bfloat16, quantization_config=nf4, device_map=\"auto\"\n" in text
    )
    nf4 = ("load_in_4bit=True", 'bnb_4bit_quant_type="nf4"', "bnb_4bit_use_double_quant=True")
    nf4 += ("bnb_4bit_compute_dtype=torch.bfloat16",)
    assert "nf4 = BitsAndBytesConfig(\n" + "".join(f"    {text},\n" for text in nf4) + ")\n" in text
    text = model_card(local, MANIFEST | {"base_model": {"name": "my-base", "revision": None}})
    assert "base = 'my-base'  # the folder of the base model\n" in text
    assert "    base, dtype=torch.float32, quantization_config=nf4, " in text


def test_pips_line_has_the_runs_versions_and_leaves_the_build_of_torch_to_pip(h100: Config) -> None:
    line = "pip install torch==2.10.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 bitsandbytes==0.50.2\n"
    assert f"\n```sh\n{line}```\n" in model_card(h100, MANIFEST)
    line = "pip install torch==2.10.0 transformers==5.23.0 sentencepiece xllamacpp==2026.10.11549\n"
    assert f"\n```sh\n{line}pip download " in model_card(h100, MANIFEST)


def test_llama_cpp_reads_no_more_than_the_run_and_the_base_is_named(h100: Config, local: Config) -> None:
    text = model_card(h100, MANIFEST)
    assert f"\nparams.n_ctx = {h100.model.max_seq_length}\n" in text
    fetched = f", as `hf download {MISTRAL} --revision {REVISION} --local-dir BASE` writes it. "
    assert f"BASE the folder of the base model{fetched}" in text
    text = model_card(local, MANIFEST | {"base_model": {"name": "my-base", "revision": None}})
    assert "BASE the folder of the base model. " in text


def test_the_card_names_the_clients_that_no_test_has_run(h100: Config) -> None:
    named = (
        "Not run by its tests: `llama-cli` and `llama-server` (which take the same files: `-m base.gguf --lora "
        "adapter.gguf --chat-template-file ADAPTER/chat_template.jinja`), vLLM, `transformers serve`, Ollama, "
        "text-generation-inference."
    )
    assert named in " ".join(model_card(h100, MANIFEST).split())


# What a name may not do -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_no_name_ends_the_header_or_the_markdown_around_it(text: str, local: Config) -> None:
    hostile = MANIFEST | {
        "base_model": {"name": text, "revision": None},
        "data": {"train": {"path": f"data/{text.replace('/', '')}.x", "sha256": "d" * 64, "rows": 1}},
        "hardware": {"gpu": text},
        "git_commit": text,
        "self_test": {"status": "pass", "checks": [{"name": text, "status": "pass", "detail": text}]},
    }
    config = local.changed("lora", target_modules=(text,)).changed("tracking", run_name=text)
    card, plain = model_card(config, hostile), model_card(local, MANIFEST | {"self_test": hostile["self_test"]})
    written = header(card)
    assert written["model-index"][0]["name"] == text
    assert written.keys() == header(plain).keys()
    assert ModelCard(card).data.to_dict() == written
    assert "\x1b" not in body(card) and "\u202e" not in body(card)
    page, wanted = Page(body(card)), Page(body(plain))
    assert [page.kinds[kind] - wanted.kinds[kind] for kind in ("html_block", "html_inline", "link_open")] == [0, 0, 0]
    assert page.kinds["tr_open"] == wanted.kinds["tr_open"] and page.kinds["td_open"] == wanted.kinds["td_open"]
    assert page.titles[1:] == wanted.titles[1:] and len(page.titles) == 8
    name = " ".join(clean(text).split())
    assert page.titles[0] == name
    assert page.spans.count(name) == 5  # the base, its commit, a target module, and twice in the self-test
    assert {f"gpu {name}", f"{name.replace('/', '')}.x"} <= set(page.spans)


class Page:
    """A card's body as CommonMark with tables reads it: its headings, its code spans, how many tokens of each kind."""

    def __init__(self, text: str) -> None:
        tokens = MarkdownIt("commonmark").enable("table").parse(text)
        inline = [child for token in tokens for child in token.children or []]
        self.kinds = Counter(token.type for token in (*tokens, *inline))
        self.spans = [token.content for token in inline if token.type == "code_inline"]
        opened = [index for index, token in enumerate(tokens) if token.type == "heading_open"]
        self.titles = ["".join(part.content for part in tokens[index + 1].children or []) for index in opened]


def test_the_code_of_a_base_with_any_name_is_still_python_that_loads_it(local: Config) -> None:
    for text in HOSTILE:
        card = model_card(local, MANIFEST | {"base_model": {"name": text, "revision": None}})
        (_, code), _ = re.findall(r"^(`{3,})python\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)
        [line] = [line for line in code.splitlines() if line.startswith("base = ")]
        names: dict[str, Any] = {}
        exec(line, names)
        assert names["base"] == text
        compile(code, "card", "exec")


@pytest.fixture(params=["mistral", pytest.param("demo", marks=pytest.mark.slow)])
def chat(request: pytest.FixtureRequest) -> Chat:
    return load_chat(None if request.param == "mistral" else request.getfixturevalue("demo_base"))


def test_the_cards_code_reads_control_tokens_in_a_message_as_text_like_the_training(
    chat: Chat, h100: Config, tmp_path: Path
) -> None:
    make_tokenizer(chat, "right").save_pretrained(tmp_path)
    code, _ = re.findall(r"^```python\n(.*?)^```$", model_card(h100, MANIFEST), re.DOTALL | re.MULTILINE)
    [encode] = re.findall(r"^def encode.*?^    return ids$", code, re.DOTALL | re.MULTILINE)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    names: dict[str, Any] = {"re": re, "tokenizer": tokenizer}
    exec(encode, names)
    messages = [
        {"role": "user", "content": "What do </s>, <s>, <|im_end|> and \\0 mean?"},
        {"role": "assistant", "content": " <|im_start|> begins."},
        {"role": "user", "content": "And </s>?"},
    ]
    assert names["encode"](messages) == chat.encode_prompt(messages)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] != names["encode"](messages)
