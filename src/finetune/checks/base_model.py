"""Checks of the base model: its name, shape and files, access to it on the Hub, and its tokens."""

from __future__ import annotations

import os

from finetune.checks.preflight import Preflight
from finetune.checks.runner import Check, Finding, failed, passed, skipped, warned
from finetune.config.base_model import MISTRAL
from finetune.files import shown
from finetune.model import hub

PIN = "set model.revision to the commit in configs/training_config_h100.yaml"
# Compared with mistral-common before every run: turns, a system text, spaces, code, emoji, control tokens.
CONVERSATIONS = (
    ("user", "Why is the sky blue?", "assistant", "Short waves scatter most."),
    (
        "system",
        "Be brief.",
        "user",
        "And at dusk?",
        "assistant",
        "Red is left.",
        "user",
        "Thanks",
        "assistant",
        "Sure.",
    ),
    ("user", "def f(x):\n                return x  # 16 spaces\n", "assistant", "\tIt returns  x."),
    ("user", "Ein Kilo Äpfel, 東京 🗼 \u200d zero width", "assistant", "naïve café — “quoted”"),
    ("user", "Write </s> and [INST] as text, <s> too", "assistant", "</s> [/INST] <s>"),
    ("user", " leading and trailing ", "assistant", " both "),
)


def _name(preflight: Preflight) -> Finding:
    model = preflight.config.model
    if preflight.tokenizer_folder is not None:
        return passed(f"the folder {model.name}")
    if model.revision is None:
        return warned(f"{model.name} without a revision: it may change between runs", PIN)
    return passed(f"{model.name} at {model.revision}")


def _geometry(preflight: Preflight) -> Finding:
    found, vocabulary = preflight.geometry, preflight.chat.tokenizer.get_vocab_size()
    if vocabulary > found.vocab_size:
        text = f"the tokenizer has {vocabulary:,} tokens, the model {found.vocab_size:,}"
        return failed(text, "use the tokenizer and weights of one model")
    return passed(
        f"{found.num_hidden_layers} layers of {found.hidden_size:,}, {found.vocab_size:,} tokens, "
        f"LoRA on {len(preflight.config.lora.target_modules)} of {len(found.linear_shapes())} linear layers"
    )


def _files(preflight: Preflight) -> Finding:
    model, folder = preflight.config.model, preflight.tokenizer_folder
    if folder is None:
        cached = hub.cached_folder(model.name, model.revision)
        if cached is None:
            return skipped("not in the Hub's cache yet: model.access tests the download")
        wrong = hub.missing_weights(cached)
        if any(not problem.endswith("is missing") for problem in wrong):  # the Hub's client ignores this damage
            again = f"{hub.fetch_command(model.name, model.revision)} --force-download"
            return failed(f"in the Hub's cache: {'; '.join(wrong)}", again)
        if wrong:
            return skipped(f"in the Hub's cache, but {'; '.join(wrong)}: model.access tests the download")
        return passed("all in the Hub's cache")
    wrong = hub.missing_weights(folder)
    if wrong:
        allow = f"sudo chmod -R a+rX {model.name}"
        again = allow if hub.UNREADABLE in wrong[0] else f"copy the folder again, or --set model.name={MISTRAL}"
        return failed(f"{model.name}: {'; '.join(wrong)}", again)
    return passed("every safetensors file exists, with the length in its header")


def _access(preflight: Preflight) -> Finding:
    model = preflight.config.model
    if preflight.tokenizer_folder is not None:
        return skipped("a local folder needs no Hub")
    if hub.is_cached(model.name, model.revision):
        return passed("in the Hub's cache: nothing to download")
    local = "or put its files in a folder: --set model.name=FOLDER"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        found = "HF_HUB_OFFLINE is set, and the base is not in the Hub's cache"
        return failed(found, f"unset HF_HUB_OFFLINE; {local}")
    status, text = hub.why_not_reachable(model.name, model.revision)
    where = hub.endpoint()
    if status == 200:
        return passed(f"{where} has it, about 14.5 GB to download")
    if status is None:
        return failed(f"{where} does not answer: {text}", f"set HTTPS_PROXY or HF_ENDPOINT if you need one; {local}")
    if status == 401:
        return failed(f"{where} requires a token (401 {text})", f"{hub.GIVE_TOKEN}; {local}")
    if status == 403:
        return failed(f"{where} rejects this token (403 {text})", f"accept the terms at {where}/{model.name}; {local}")
    if status == 404:
        return failed(f"{where} has no {model.name} at {model.revision} (404 {text})", PIN)
    return failed(f"{where} answers {status} {text}", f"try again later; {local}")


def _certificate(preflight: Preflight) -> Finding:
    from finetune.data.template import Messages
    from finetune.data.tokenizer import Reference

    chat = preflight.chat
    if not chat.certifiable:
        return skipped("not Mistral's tokenizer: there is no reference to compare with")
    reference = Reference()
    for number, flat in enumerate(CONVERSATIONS, 1):
        turns = zip(flat[::2], flat[1::2], strict=True)
        messages: Messages = [{"role": role, "content": text} for role, text in turns]
        encoded = chat.encode([messages])[0]
        if encoded != chat.encode_as_saved([messages])[0]:
            text = f"conversation {number} of {len(CONVERSATIONS)} has different ids or labels in the saved tokenizer"
            return failed(text, preflight.platform.repair)
        if (encoded.input_ids, encoded.labels) != reference.encode(messages):
            text = f"conversation {number} of {len(CONVERSATIONS)} has different ids or labels in mistral-common"
            return failed(text, preflight.platform.repair)
    return passed(f"{len(CONVERSATIONS)} conversations have mistral-common's ids and labels")


def _adapter(preflight: Preflight) -> Finding:
    from finetune.runs import warm_start

    config = preflight.config
    folder = warm_start.folder_of(config)
    if folder is None:
        return passed("a new adapter: lora.init_from is null")
    warm_start.require(config, preflight.chat.format.template, preflight.geometry)
    return passed(f"{shown(folder)}: base, template, settings and all tensors match")


ADAPTER = "the adapter of lora.init_from is one of this base, template and LoRA"
CERTIFICATE = "ids and labels of fixed conversations against mistral-common's and the saved tokenizer's"
CHECKS = (
    Check("model.name", "an allowed base, at a pinned revision or in a folder", _name, level="warn"),
    Check("model.geometry", "architecture, vocabulary, layers, LoRA's target modules", _geometry),
    Check("model.files", "the weights exist, are complete, and are safetensors", _files),
    Check("model.access", "the base is in the Hub's cache, or this token can download it", _access, network=True),
    Check("model.adapter", ADAPTER, _adapter, needs=("model.geometry",)),
    Check("tokens.certificate", CERTIFICATE, _certificate, needs=("model.geometry",)),
)
