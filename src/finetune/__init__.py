"""QLoRA fine-tuning of Mistral-7B-Instruct-v0.2. What even the first screen needs is looked for here."""

import importlib.util
import sys

_missing = [name for name in ("packaging", "psutil", "yaml") if importlib.util.find_spec(name) is None]
if sys.version_info < (3, 11) or _missing:
    _found = f"Python {sys.version.split()[0]}, expected 3.11 to 3.13" if sys.version_info < (3, 11) else ""
    _absent = f"not installed for {sys.executable}: {', '.join(_missing)}" if _missing else ""
    print("; ".join(filter(None, (_found, _absent))), file=sys.stderr)
    print("type: scripts/make_venv.sh, then run this with .venv/bin/python", file=sys.stderr)
    raise SystemExit(3)
