"""The HTML report: complete in itself, escaped, with numbers where they belong."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from st4vla_jax.eval.report import Section, write_report

VOID = {"meta", "img", "polyline", "rect"}


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_is_one_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    section = Section(
        "A <b> & c", ["line <1>"], ("who", "n"), [("x<y", "0.5")],
        [("cup & plate", Image.fromarray(pixels))],
        {"pss": {"run": [(0, 0.0), (5, math.nan), (10, 2.0)]}, "none": {"empty": []}},
    )  # fmt: skip
    path = tmp_path / "report.html"
    write_report(path, "title <t>", [section, Section("Second")])
    text = path.read_text()
    page = Balanced()
    page.feed(text)
    assert page.open == []
    for words in ("title <t>", "A <b> & c", "line <1>", "x<y", "0.5", "Second"):
        assert words in page.text
    assert not re.search(r'(src|href)="(?!data:)', text)
    data = re.search(r'src="data:image/png;base64,([^"]+)"', text)[1]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(shown, pixels)
    # Ends of the finite part of the curve, at opposite corners of its frame.
    assert re.findall(r'points="([^"]+)"', text) == ["46.0,174.0 374.0,46.0"]
    assert "none: no finite values" in page.text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
