"""What must hold for any bytes of a config and of a data file, whoever makes them up."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.data.jsonl import read_lines
from finetune.errors import ConfigError
from finetune.wording import clean

if TYPE_CHECKING:
    from finetune.data.encode import Encoder

LENGTH = 64  # tokens a row, in these tests


def check_config(content: bytes, path: Path) -> None:
    """Written to `path`, it is a config, or a config error that prints."""
    path.write_bytes(content)
    try:
        config, _ = load_config(str(path))
    except ConfigError as error:
        assert error.problems
        said = clean(str(error)).replace("\n", "")
        assert not [character for character in said if unicodedata.category(character) in ("Cc", "Cs")]
    else:
        assert isinstance(config, Config)
        assert json.loads(json.dumps(config.as_dict())) == config.as_dict()


def check_jsonl(content: bytes, encoder: Encoder) -> None:
    """Each line is a row as mistral-common has it, or a bad row that prints."""
    numbered = list(read_lines(io.BytesIO(content)))
    outcome = encoder.encode(numbered)
    chunk = outcome.rows
    assert outcome.mismatch is None
    assert sorted([*chunk.lines.tolist(), *(line for line, _ in outcome.bad)]) == [n for n, _ in numbered]
    assert all(text.isprintable() for _, text in outcome.bad)
    assert chunk.lengths.sum() == len(chunk.input_ids) == len(chunk.labels)
    assert all(0 <= length <= LENGTH for length in chunk.kept(LENGTH))
