"""Checks of the data: every row is valid, and lengths, labels, duplicates and leakage are as expected."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from finetune.checks.preflight import Preflight
from finetune.checks.runner import Check, Finding, passed, warned
from finetune.cli import command
from finetune.data.jsonl import SYSTEM_KEYS
from finetune.files import quoted, shown
from finetune.wording import counted, lines, listed

MOST_CUT = 0.1  # warn if more than this share of the rows is cut or dropped
LEAST_SUPERVISED = 0.05  # warn below this share of tokens with loss: most of the time would go into prompts
PREVIEW_WIDTH = 300
LISTED_KEYS = 10
LISTED_BAD = 5
LEARNT = {
    "all": "what the assistant says, and its end",
    "last": "the assistant's last message of each row, and its end",
}


def _rows(preflight: Preflight) -> Finding:
    prepared, dataset = preflight.prepared, preflight.config.dataset
    train, validation = prepared.statistics["train"], prepared.statistics["validation"]
    found = f"{train.rows:,} to train on, {validation.rows:,} held out ({prepared.split_reason})"
    if train.repeated:
        found += f"; {train.repeated:,} of the training rows are repeats, by the weight of their file"
    if train.left_out:
        found += f"; {counted(train.left_out, 'row')} left out by the weight of their file"
    bad = [f"{place.shown}: {text}" for it in (train, validation) for place, text in it.bad]
    if bad:
        left_out = f"{found}; {counted(len(bad), 'bad row')} dropped:\n{lines(bad, LISTED_BAD)}"
        return warned(left_out, "--set dataset.on_bad_row=fail lists them")
    compared, rows = train.certified + validation.certified, train.encoded + validation.encoded
    if dataset.certificate and compared:
        found += f"; {compared:,} of {rows:,} compared with mistral-common"
    return passed(found)


def _keys(preflight: Preflight) -> Finding:
    counts: Counter[str] = Counter()
    for it in preflight.prepared.statistics.values():
        counts.update(it.other_keys)
    if not counts:
        return passed("no row has keys other than messages")
    systems = {key: counts.pop(key) for key in SYSTEM_KEYS if key in counts}
    found = [f"{key} became the system message of {counted(count, 'row')}" for key, count in systems.items()]
    if counts:
        unread = [f"{key!a} in {counted(count, 'row')}" for key, count in counts.most_common()]
        found.append(f"ignored keys: {listed(unread, LISTED_KEYS)}")
    return warned("; ".join(found), "nothing, if intended" + ("; training reads only messages" if counts else ""))


def _lengths(preflight: Preflight) -> Finding:
    train, limit = preflight.prepared.statistics["train"], preflight.config.model.max_seq_length
    changed = train.truncated + train.dropped_long
    found = (
        f"{train.tokens:,} tokens; half the rows have at most {train.p50:,}, 95 % {train.p95:,}, "
        f"all {train.longest:,}; {train.truncated:,} cut and {train.dropped_long:,} dropped at {limit:,}"
    )
    if changed > MOST_CUT * (train.rows + train.dropped_long):
        # The lengths of dropped rows are not kept, so the length that would fit them is unknown.
        longer, keeps = (2 * limit, "more of them") if train.dropped_long else (_round_up(train.p95), "95 % whole")
        return warned(found, f"--set model.max_seq_length={longer} keeps {keeps}, if memory allows")
    return passed(found)


def _round_up(tokens: int) -> int:
    """Round up to a multiple of 256, which suits the kernels."""
    return -(-tokens // 256) * 256


def _labels(preflight: Preflight) -> Finding:
    statistics, train_on = preflight.prepared.statistics, preflight.config.dataset.train_on
    train = statistics["train"]
    share = train.supervised_tokens / train.tokens
    found = f"{train.supervised_tokens:,} tokens carry loss ({share:.1%}): {LEARNT[train_on]}"
    without = sum(it.dropped_without_loss for it in statistics.values())
    if without:
        found += f"; {counted(without, 'row')} dropped because no turn carries loss"
    if share < LEAST_SUPERVISED and train_on == "last":
        return warned(found, "--set dataset.train_on=all also trains on the earlier answers")
    if share < LEAST_SUPERVISED:
        return warned(found, "shorten the prompts, or put several questions about one document into one conversation")
    if without:
        return warned(found, "nothing, if intended; otherwise remove weight 0 from the answers to train on")
    return passed(found)


def _duplicates(preflight: Preflight) -> Finding:
    prepared, dataset = preflight.prepared, preflight.config.dataset
    dropped = sum(it.dropped_duplicates for it in prepared.statistics.values())
    if dropped:
        return passed(f"no duplicate rows; copies dropped: {dropped:,}")
    copies = {name: it.duplicates for name, it in prepared.statistics.items() if it.duplicates}
    if not copies:
        return passed("no duplicate rows")
    first = next(it.first_copy for it in prepared.statistics.values() if it.duplicates)
    counts = ", ".join(f"{count:,} in {name}" for name, count in copies.items())
    assert first is not None
    where = f"on line {first.line}" if len(dataset.train_files) == 1 else first.shown
    found = f"copies of other rows: {counts}, the first {where}"
    return warned(found, "unless they are intended: --set dataset.on_duplicate=drop")


def _leakage(preflight: Preflight) -> Finding:
    validation = preflight.prepared.statistics["validation"]
    found = []
    if validation.first_leak is not None:
        first, other = validation.first_leak
        where = f"line {first.line} of {shown(Path(first.file))} matches line {other.line} of {other.file}"
        rows = _with_verb(validation.normalized_leaks, "differs", "differ")
        found.append(f"{rows} from training rows only in spaces and case; {where}")
    if validation.first_opening is not None:
        first, other = validation.first_opening
        where = f"line {first.line} of {shown(Path(first.file))} and line {other.line} of {other.file}"
        rows = _with_verb(validation.opening_leaks, "has", "have")
        found.append(f"{rows} the system and first user message of a training row, for example {where}")
    if not found:
        return passed("no validation row has the system and first user message of a training row")
    return warned("; ".join(found), "remove them from one of the two: they make eval_loss look better than it is")


def _with_verb(rows: int, one: str, several: str) -> str:
    return f"{counted(rows, 'validation row')} {one if rows == 1 else several}"


def _control_tokens(preflight: Preflight) -> Finding:
    counts = preflight.prepared.statistics
    rows = sum(it.control_tokens for it in counts.values())
    if rows:
        first = next(it.first_control_token for it in counts.values() if it.first_control_token)
        found = f"the template's control tokens appear as text in {counted(rows, 'row')}, the first {first.shown}"
        shows = f"{command('scripts/inspect_data.py')} {quoted(Path(first.file))} --rows {first.line}-{first.line}"
        return warned(found, f"{shows} shows how they are encoded")
    return passed("no row contains the template's control tokens as text")


def _preview(preflight: Preflight) -> Finding:
    from finetune.data.preview import marked, preview

    return passed(f"loss on the text in >><<: {marked(preview(preflight.prepared, PREVIEW_WIDTH))}")


_ROWS = ("data.rows",)
CHECKS = (
    Check(
        "data.rows",
        "every row is a valid conversation; rows that were compared have mistral-common's tokens",
        _rows,
        needs=("model.geometry", "paths.output"),  # the tokenizer, and where the encoded rows are kept
    ),
    Check("data.keys", "keys other than messages", _keys, needs=_ROWS, level="warn"),
    Check("data.lengths", "tokens and row lengths; few rows cut or dropped", _lengths, needs=_ROWS, level="warn"),
    Check("data.labels", "the share of tokens that carry loss", _labels, needs=_ROWS, level="warn"),
    Check("data.duplicates", "no duplicate rows", _duplicates, needs=_ROWS, level="warn"),
    Check(
        "data.leakage",
        "no validation row differs from a training row only in spaces and case, or begins like one",
        _leakage,
        needs=_ROWS,
        level="warn",
    ),
    Check(
        "data.control_tokens",
        "no row contains the template's control tokens ([INST], </s>) as text",
        _control_tokens,
        needs=_ROWS,
        level="warn",
    ),
    Check("data.preview", "one row, marked where it carries loss", _preview, needs=_ROWS, level="warn"),
)
