"""A page as a person reads it, and text that would do harm in one."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

HOSTILE = (
    "<script>document.title='taken'</script><img src=x onerror=alert(1)></svg></style>\"'><b id=escaped>"
    "\u202edetrever\u2066 {{ 7*7 }} $\\frac{1}{2}$ \x1b[31m https://example.org/track " + "wide" * 200
)


class Reader(HTMLParser):
    """What a page is made of: its tags, its links, and the text that a person reads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.events: list[str] = []
        self.ids: list[str] = []
        self._words: list[str] = []
        self._skip = False
        self.feed(page.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._skip = tag == "style"
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action") and not (value or "").startswith("#"):
                self.links.append(value or "")
            if name.startswith("on"):
                self.events.append(name)
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self._words.append(data)

    def order(self, *texts: str) -> bool:
        """Whether all of `texts` are there, in this order."""
        places = [self.text.find(text) for text in texts]
        return -1 not in places and places == sorted(places)
