"""Charts as SVG, and their descriptions."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from finetune.results.report import charts
from finetune.results.report.charts import Line
from finetune.wording import clean
from support.pages import HOSTILE


def test_values_that_are_not_finite_are_left_out_of_a_curve() -> None:
    points = [(1, 2.0), (2, float("nan")), (3, float("inf")), (4, 1.0), (5, float("nan"))]
    assert charts.in_words("Loss", points) == "Loss: from 2 at step 1 to nan at step 5, least 1, most 2."
    assert charts.in_words("Loss", points[-1:]) == "Loss: from nan at step 5 to nan at step 5."
    svg = charts.curves("loss", HOSTILE, HOSTILE, [Line(HOSTILE, points)], None)
    root = ElementTree.fromstring(svg)
    assert root[0].text == clean(HOSTILE)
    assert not [element.tag for element in root.iter() if element.tag.endswith(("script", "img", "style"))]
    assert not re.search(r"\bnan\b|\binf\b", svg.split("</desc>")[1])
