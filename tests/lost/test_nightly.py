"""The one line of scripts/nightly.py."""

from __future__ import annotations

import importlib.util

from harness import ROOT


def test_the_nightly_line_says_what_was_tried_what_was_lost_and_how_long_it_took() -> None:
    spec = importlib.util.spec_from_file_location("nightly", ROOT / "scripts" / "nightly.py")
    assert spec is not None and spec.loader is not None
    nightly = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nightly)
    counts = {"kills": 237, "damaged": 6173, "used": 1, "inputs": 55000}
    said = "nightly: 237 kills, 0 runs lost; 6,173 damaged files, 1 used; 55,000 inputs, 0 crashes; 18 min"
    assert nightly.summary(counts, 1090.0) == said
