"""Bytes of a web page to its main text: the encoding, a fast extractor, and a careful one for pages where the fast one is unsure.

The fast extractor gives every paragraph's weight to the boxes around it, takes the box with the most, and keeps its blocks that are
not mostly links and stand in no box that is named like a menu, comments or advertising. It is unsure when it found little, or less
than half of what stands in the page's paragraphs. The names and both limits were chosen on the 181 pages of bench/extract.py.
"""

import codecs
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

from modelwright.core.errors import UserError

LITTLE = 300  # characters
PART = 0.5  # of the characters in paragraphs
DEEP = 40  # boxes around a block that are looked at
NESTED = 2000  # boxes in each other; no browser shows a page that is nested deeper
LARGEST = 1 << 24  # bytes of a page
_DROP = "script,style,noscript,template,nav,footer,aside,form,iframe,svg,button,select,figure figcaption,[hidden]"
_BLOCKS = "p,h1,h2,h3,h4,h5,li,blockquote,pre,td"
_TAG = re.compile(r"<(/?)(?:div|span|section|article|table|tr|td|ul|ol|font|blockquote|center|b|i|em|strong|a)\b", re.I)
_SIDE = re.compile(
    r"comment|related|share|social|sidebar|promo|advert|\bads?\b|newsletter|subscribe|footer|breadcrumb|byline|recommend|popular|trending|"
    r"widget|cookie|disqus|taboola|outbrain|caption|author|meta|tags?\b|nav|menu|signup|sign-up|popup|modal",
    re.I,
)
_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]{2,40})""", re.I)
_HEADER = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.I)
_WIDER = {"iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"}
_SILENT = {"script", "style", "noscript", "template"}
_INLINE = {"a", "b", "i", "em", "strong", "span", "font", "code", "sub", "sup", "small", "u", "abbr", "q", "cite", "mark", "s"}
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class Text:
    """A page's text, and which extractor found it."""

    text: str
    by: str


def decode(page: bytes, content_type: str = "") -> tuple[str, str]:
    """The page as text, and its encoding: byte order mark, header, meta tag, UTF-8 if it is, else Windows-1252.

    A declared encoding that does not fit the bytes gives way to the next; what no encoding fits is replaced by U+FFFD.
    """
    names = [name for mark, name in _MARKS if page.startswith(mark)]
    names += _HEADER.findall(content_type)[:1]
    names += [m.decode("ascii", "replace") for m in _CHARSET.findall(page[:4096])[:1]]
    for name in [*names, "utf-8"]:
        try:
            name = codecs.lookup(name).name
            return page.decode(_WIDER.get(name, name)), _WIDER.get(name, name)
        except (LookupError, UnicodeError):
            continue
    try:
        return page.decode("cp1252"), "cp1252"
    except UnicodeError:
        return page.decode("utf-8", "replace"), "utf-8, with errors"


def too_deep(html: str) -> bool:
    """Whether more than NESTED boxes stand in each other; the time of the extractors grows with the square of it."""
    if html.count("<") < 2 * NESTED:
        return False
    depth = 0
    for tag in _TAG.finditer(html):
        depth = max(depth + (-1 if tag[1] else 1), 0)
        if depth > NESTED:
            return True
    return False


def needed(name: str) -> Any:
    """An optional library of this stage."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        what = name.split(".")[0]
        raise UserError(f"{what} is not installed", "web pages are read with it", "pip install 'modelwright[web]'") from None


def _name(node: Any) -> str:
    a = node.attributes
    return f"{a.get('class') or ''} {a.get('id') or ''}"


def _links(node: Any) -> int:
    return sum(len(a.text()) for a in node.css("a"))


def _main_box(tree: Any) -> tuple[Any, int]:
    """The box with the most weight, and how many characters stand in paragraphs."""
    weight: dict[int, float] = {}
    box: dict[int, Any] = {}
    total = 0
    for p in tree.css("p,pre,blockquote"):
        text = p.text().strip()
        if len(text) < 25:
            continue
        total += len(text)
        if _links(p) > 0.5 * len(text):
            continue
        points, around = 1 + text.count(",") + min(len(text) // 100, 3), p.parent
        for part in (1, 0.5, 0.25):
            if around is None:
                break
            box[around.mem_id] = around
            weight[around.mem_id] = weight.get(around.mem_id, 0) + points * part
            around = around.parent
    best = max(weight, key=lambda i: weight[i] * (0.3 if _SIDE.search(_name(box[i])) else 1), default=None)
    return (None if best is None else box[best]), total


def _aside(block: Any, box: Any) -> bool:
    """Whether a box between the block and the main box is named like something beside the article."""
    node = block
    for _ in range(DEEP):
        if node is None or node.mem_id == box.mem_id:
            return False
        if _SIDE.search(_name(node)):
            return True
        node = node.parent
    return False


def fast(html: str) -> tuple[str, bool]:
    """The main text by the fast extractor, and whether it is sure."""
    tree = needed("selectolax.lexbor").LexborHTMLParser(html)
    for node in tree.css(_DROP):
        node.decompose()
    box, total = _main_box(tree)
    found = []
    for block in box.css(_BLOCKS) if box is not None else ():
        if block.tag in ("li", "td", "blockquote") and block.css_first("p") is not None:
            continue
        text = block.text().strip()
        if text and _links(block) <= 0.5 * len(text) and not _aside(block, box):
            found.append(text)
    text = "\n".join(found)
    return text, len(text) >= max(LITTLE, PART * total)


class _Words(HTMLParser):
    """All text outside scripts and styles, a line per block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.inside = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside += tag in _SILENT
        self.parts += ["\n"] if tag not in _INLINE else []

    def handle_endtag(self, tag: str) -> None:
        self.inside = max(self.inside - (tag in _SILENT), 0)
        self.parts += ["\n"] if tag not in _INLINE else []

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.parts.append(re.sub(r"\s+", " ", data))


def plain(html: str) -> str:
    """All text of the page by the standard library alone, menus and all."""
    parser = _Words()
    parser.feed(html)
    parser.close()
    lines = (re.sub(" +", " ", x).strip() for x in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line)


def careful(html: str) -> str:
    """The main text by trafilatura in its fast mode."""
    return needed("trafilatura").extract(html, include_comments=False, fast=True) or ""


def main_text(html: str, how: str = "cascade") -> Text:
    """cascade: the careful extractor where the fast one is unsure; the fast text where the careful one finds nothing.

    A page that is nested too deep has no text.
    """
    if how == "plain":
        return Text(plain(html), "plain")
    if too_deep(html):
        return Text("", "none")
    if how == "trafilatura":
        return Text(careful(html), "trafilatura")
    text, sure = fast(html)
    if sure or how == "fast":
        return Text(text, "fast")
    better = careful(html)
    return Text(better, "trafilatura") if better else Text(text, "fast")
