"""The run's README.md: a model card as the Hub reads it, which can be uploaded as it is.

It says what the manifest and the config know, and nothing else: no language, no data set id and no licence of a base
that is not known. What a person or a file was named stands in code spans, where it can end neither header nor Markdown.
"""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from finetune.config.schema import MISTRAL, Config, is_local
from finetune.files import resolve
from finetune.wording import clean

LICENSE = "apache-2.0"  # Mistral-7B-Instruct-v0.2's
HYPERPARAMETERS = (
    *(f"lora.{key}" for key in ("r", "lora_alpha", "lora_dropout", "target_modules")),
    *(f"training.{key}" for key in ("learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay")),
    *(f"training.{key}" for key in ("max_grad_norm", "optim", "num_train_epochs", "max_steps", "packing", "seed")),
    *(f"model.{key}" for key in ("dtype", "max_seq_length", "attn_implementation")),
    *(f"quantization.{key}" for key in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "storage")),
)


def model_card(config: Config, manifest: dict[str, Any]) -> str:
    """README.md in the Hub's format, of a complete run's manifest; with `self_test`, its verdict."""
    sections = {
        f"# {_escaped(config.run_name)}": _introduction(config, manifest),
        "## Use": _use(config, manifest),
        "## Results": _results(manifest),
        "## Training data": _data(manifest),
        "## Training": _training(config, manifest),
        "## Intended use and limits": _limits(config),
    }
    text = "\n\n".join(f"{title}\n\n{body}" for title, body in sections.items())
    return f"---\n{metadata(config, manifest).to_yaml()}\n---\n\n{text}\n"


def metadata(config: Config, manifest: dict[str, Any]) -> ModelCardData:
    """The card's header. `eval_results` holds the final eval_loss, on conversations that are on no Hub."""
    base = hub_base(config)
    result = EvalResult(
        task_type="text-generation",
        dataset_type="json",
        dataset_name="held-out conversations",
        dataset_split="validation",
        dataset_args={"conversations": manifest["tokens"]["validation"]["rows"]},
        metric_type="loss",
        metric_name="eval_loss",
        metric_value=manifest["eval_loss"],
    )
    return ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="peft",
        license=LICENSE if base else None,
        pipeline_tag="text-generation",
        tags=["lora", "qlora", "mistral", "trl", "sft"],
        model_name=config.run_name,
        eval_results=[result],
    )


def hub_base(config: Config) -> str | None:
    """The base's Hub id. Of a folder only where `hf download` noted there that its files are the pinned commit's.

    A geometry or a tokenizer would not tell Mistral-7B-Instruct-v0.2 from its other fine-tunes.
    """
    if not is_local(config.model.name):
        return config.model.name
    note = resolve(config.model.name) / ".cache" / "huggingface" / "download" / "config.json.metadata"
    commit = note.read_text(encoding="utf-8").splitlines()[:1] if note.is_file() else []
    return MISTRAL if config.model.revision is not None and commit == [config.model.revision] else None


def _introduction(config: Config, manifest: dict[str, Any]) -> str:
    base = hub_base(config)
    named = f"[{base}](https://huggingface.co/{base})" if base else f"a base model in a folder {_code(_base(manifest))}"
    revision = config.model.revision if base else None
    at = f" at commit {_code(revision)}" if revision else ""
    rows = manifest["tokens"]["train"]["rows"]
    return (
        f"A LoRA adapter for {named}{at}, trained by QLoRA on {rows:,} conversations. The base was held in 4 bits and "
        "stayed frozen; only the adapter was trained, and only on what the assistant says."
    )


def _base(manifest: dict[str, Any]) -> str:
    return str(manifest["base_model"]["name"])


def _use(config: Config, manifest: dict[str, Any]) -> str:
    hub = hub_base(config)
    base, place = (hub, "") if hub else (_base(manifest), "  # the folder of the base model")
    at = f", revision={config.model.revision!r}" if hub and config.model.revision else ""
    return f"""\
```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = {config.run_folder.name!r}  # this folder, or its name on the Hub
base = {base!r}{place}
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained(base{at}, dtype=torch.{config.model.dtype}, device_map="auto")
model = PeftModel.from_pretrained(model, adapter)

messages = [{{"role": "user", "content": "Your question"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs.to(model.device), max_new_tokens=200)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

The tokenizer in this folder has the chat template that the adapter was trained with."""


def _results(manifest: dict[str, Any]) -> str:
    before, after = manifest["eval_loss_before"], manifest["eval_loss"]
    rows = manifest["tokens"]["validation"]["rows"]
    lines = [
        "| | eval_loss |",
        "|---|---|",
        f"| before training | {'not measured' if before is None else f'{before:.4f}'} |",
        f"| this adapter (step {manifest['best_step']} of {manifest['steps']}) | {after:.4f} |",
        "",
        f"eval_loss is the mean negative log-likelihood, in nats, of a token that the assistant says, over {rows:,} "
        "conversations that were held out. They chose the step that was kept, so it is no test on unseen data, and it "
        "says nothing of how good whole answers are.",
    ]
    if "self_test" in manifest:
        lines += ["", *_self_test(manifest["self_test"])]
    return "\n".join(lines)


def _self_test(verdict: dict[str, Any]) -> list[str]:
    """The adapter as it lies here, loaded again: what was looked at and found."""
    lines = [f"The saved adapter was loaded again and tested: {_code(verdict['status'])}.", ""]
    for check in verdict["checks"]:
        failed = "" if check["status"] == "pass" else "**failed**: "
        lines.append(f"- {failed}{_code(check['name'])}: {_code(check['detail'])}")
    return lines


def _data(manifest: dict[str, Any]) -> str:
    lines = []
    for name, counts in manifest["tokens"].items():
        file = manifest["data"].get(name)
        source = f"file {_code(file['path'].rsplit('/', 1)[-1])}, sha256 `{file['sha256']}`" if file else "split off"
        tokens = f"{counts['total']:,} tokens, {counts['supervised']:,} of them with loss"
        lines.append(f"- {name}: {counts['rows']:,} conversations, {tokens}; {source}")
        lines.append(f"  - token ids sha256 `{counts['input_ids']}`, labels `{counts['labels']}`")
    return "\n".join(
        [*lines, "", "The data itself is not here. Its licence and its languages are for its owner to state."]
    )


def _training(config: Config, manifest: dict[str, Any]) -> str:
    tree = config.as_dict()
    lines = ["| setting | value |", "|---|---|"]
    for path in HYPERPARAMETERS:
        section, key = path.split(".")
        value = tree[section][key]
        lines.append(f"| {path} | {_cell(', '.join(value) if isinstance(value, list) else value)} |")
    lines.append(f"| sequences an optimizer step | {config.effective_batch_size} |")
    early = ", stopped early" if manifest["stopped_early"] else ""
    hardware = ", ".join(f"{name} {value}" for name, value in manifest["hardware"].items() if value is not None)
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    changes = [
        f"- from step {start['from_step']:,} on with changes: {_code('; '.join(start['changed']))}"
        for start in manifest["starts"]
        if start.get("changed")
    ]
    return "\n".join(
        [
            *lines,
            "",
            *changes,
            f"- {manifest['steps']:,} steps in {manifest['seconds'] / 3600:.2f} hours{early}; "
            f"{manifest['tokens_per_second']:,.0f} tokens/s, at most {manifest['peak_memory_gib']:.1f} GiB",
            f"- hardware: {_code(hardware)}",
            f"- versions: {_code(versions)}",
            f"- program's commit: {_code(manifest['git_commit'] or 'not known')}",
            f"- config sha256 `{manifest['config_sha256']}`",
            f"- adapter sha256 `{manifest['adapter_sha256']}`",
        ]
    )


def _limits(config: Config) -> str:
    system = "was" if config.system_prompt else "was not"
    return f"""\
- For text in the style and of the kind of the training conversations, in turns of user and assistant. A system prompt
  {system} added to those without one; sequences had at most {config.model.max_seq_length:,} tokens.
- It keeps the base model's own limits, biases and terms of use, and may have lost some of what the base could do.
- It can be confidently wrong, and can repeat what stood in its training data: look at that before you share it.
- It was not tested for safety, for other languages or for any benchmark."""


def _escaped(text: str) -> str:
    """`text` on one line with nothing in it that Markdown acts on."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~&])", r"\\\1", " ".join(clean(text).split()))


def _code(text: str) -> str:
    """`text` as a code span on one line: fenced by more backticks than stand beside each other in it."""
    line = " ".join(clean(str(text)).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    room = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{room}{line}{room}{fence}"


def _cell(value: object) -> str:
    """A code span in a table, where a bar would begin the next cell."""
    return _code(str(value)).replace("|", "\\|")
