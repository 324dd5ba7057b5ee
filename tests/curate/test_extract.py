"""Pages to text: encodings, the cascade, damaged archives, and the published rows of the benchmark."""

import gzip
import json
from pathlib import Path

import pytest

from modelwright.core.errors import UserError
from modelwright.curate.extract import Knobs, articles, benchmark, extract
from modelwright.curate.kernels.articles import score
from modelwright.curate.kernels.pages import decode

PUBLISHED = {
    "AutoExtract": 0.970, "Diffbot": 0.951, "trafilatura": 0.958, "go_trafilatura": 0.960, "readability": 0.922, "goose3": 0.896,
    "justext": 0.804, "html-text": 0.665,
}  # fmt: skip
SENTENCE = "The harbour was quiet in the morning, and the boats lay still at the pier, waiting for the tide to turn. "


def page(body: str, head: str = "") -> bytes:
    return f"<html><head><title>t</title>{head}</head><body>{body}</body></html>".encode()


ARTICLE = page(
    "<nav><a href=/>Home</a> <a href=/n>News</a></nav><div id=main><h1>The harbour</h1>"
    + "".join(f"<p>{i}: {SENTENCE * 2}</p>" for i in range(6))
    + "</div><div class=sidebar><p>Subscribe to our letter, and read more every day of the week.</p></div><footer>2020</footer>"
)


@pytest.mark.parametrize(
    ("body", "header", "text", "encoding"),
    [
        ("é".encode(), "", "é", "utf-8"),
        ("é".encode("cp1252"), "", "é", "cp1252"),
        ("é”".encode("cp1252"), "text/html; charset=iso-8859-1", "é”", "cp1252"),
        ("漢".encode("gb18030"), 'text/html; charset="gb2312"', "漢", "gb18030"),
        (b"<meta charset=shift_jis>" + "かな".encode("cp932"), "", "<meta charset=shift_jis>かな", "cp932"),
        ("\ufeffé".encode("utf-16-le"), "charset=utf-8", "é", "utf-16"),
        ("é".encode("cp1252"), "charset=utf-8", "é", "cp1252"),
        (b"a", "charset=nonsense", "a", "utf-8"),
        (b"\x81\xff", "", "\ufffd\ufffd", "utf-8, with errors"),
    ],
)
def test_the_encoding_is_found_in_order(body: bytes, header: str, text: str, encoding: str) -> None:
    assert decode(body, header) == (text, encoding)


def test_the_score_counts_shingles_as_a_multiset() -> None:
    found = score({"a": "one two three four five", "b": "x"}, {"a": "one two three four six", "b": "x"})
    assert found == pytest.approx({"f1": 0.75, "precision": 0.75, "recall": 0.75, "accuracy": 0.5})
    assert score({"a": "x y"}, {})["f1"] == 0


def test_published_rows_come_out_to_three_digits(shared: Path) -> None:
    root = shared / "article_extraction"
    truth = articles(root / "ground-truth.json")
    for name, f1 in PUBLISHED.items():
        found = score(truth, articles(root / "output" / f"{name}.json.gz"))
        assert round(found["f1"], 3) == f1
        if name == "AutoExtract":
            assert [round(found[k], 3) for k in ("precision", "recall", "accuracy")] == [0.984, 0.956, 0.470]


@pytest.mark.slow
def test_the_cascade_reaches_95_on_the_benchmark(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("trafilatura", reason="the extra `web` is not installed")
    pytest.importorskip("selectolax", reason="the extra `web` is not installed")
    systems = benchmark(shared / "article_extraction", "cascade", tmp_path)["systems"]
    assert systems["ours, cascade"]["f1"] >= 0.95 and systems["ours, cascade"]["careful"] < 40


def out(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "dataset.jsonl").read_text().splitlines()]


@pytest.fixture
def web() -> None:
    for name in ("selectolax", "trafilatura", "fastwarc"):
        pytest.importorskip(name, reason="the extra `web` is not installed")


def test_an_article_is_kept_without_its_menu_and_sidebar(tmp_path: Path, web: None) -> None:
    (tmp_path / "a.html").write_bytes(ARTICLE)
    (tmp_path / "b.html.gz").write_bytes(gzip.compress(ARTICLE))
    facts = extract(Knobs(pages=str(tmp_path)), tmp_path)
    rows = out(tmp_path)
    assert facts["kept"] == facts["pages"] == 2 and [r["extractor"] for r in rows] == ["fast", "fast"]
    assert rows[0]["text"] == rows[1]["text"] and rows[0]["text"].count("harbour was quiet") == 12
    assert not {"Home", "Subscribe", "2020"} & set(rows[0]["text"].split())


def test_plain_text_needs_no_library_and_keeps_blocks_apart(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(
        page("<script>x()</script><p>One <b>bold</b>  word.</p><ul><li>two &amp; three<li>four</ul><style>p{}</style>")
    )
    extract(Knobs(pages=str(tmp_path), how="plain"), tmp_path)
    assert out(tmp_path)[0]["text"] == "t\nOne bold word.\ntwo & three\nfour"


def warc(records: list[tuple[str, bytes, bytes]]) -> bytes:
    """url, head and body of responses as a WARC file."""
    whole = b""
    for url, head, body in records:
        http = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + body
        top = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2020-01-01T00:00:00Z\r\n"
        top += f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
        whole += gzip.compress(top.encode() + http + b"\r\n\r\n")
    return whole


HTML = b"Content-Type: text/html; charset=utf-8\r\n"


def test_warc_responses_are_read_and_the_rest_counted(tmp_path: Path, web: None) -> None:
    bomb = gzip.compress(b"<p>" + bytes(1 << 26))
    records = [
        ("http://a", HTML, ARTICLE),
        ("http://b", b"Content-Type: image/png\r\n", b"x"),
        ("http://c", HTML + b"Content-Encoding: gzip\r\n", gzip.compress(ARTICLE)),
        ("http://d", HTML + b"Content-Encoding: gzip\r\n", bomb),
        ("http://e", HTML, page("")),
    ]
    (tmp_path / "x.warc.gz").write_bytes(warc(records))
    facts = extract(Knobs(pages=str(tmp_path / "x.warc.gz")), tmp_path)
    assert [r["url"] for r in out(tmp_path)] == ["http://a", "http://c"] and facts["removed: without text"] == 1
    assert facts["dropped: responses that are no pages (x.warc.gz)"] == facts["dropped: pages above 16 MiB (x.warc.gz)"] == 1


def test_a_truncated_warc_loses_only_its_rest(tmp_path: Path, web: None) -> None:
    whole = warc([(f"http://{i}", HTML + f"Content-Length: {len(ARTICLE)}\r\n".encode(), ARTICLE) for i in range(4)])
    (tmp_path / "x.warc.gz").write_bytes(whole[: int(len(whole) * 0.8)])
    facts = extract(Knobs(pages=str(tmp_path)), tmp_path)
    assert [r["url"] for r in out(tmp_path)] == ["http://0", "http://1", "http://2"]
    assert sum(v for k, v in facts.items() if k.startswith("dropped")) == 1


def test_nested_and_strange_pages_do_not_stop_the_rest(tmp_path: Path, web: None) -> None:
    odd = {
        "deep": page("<div>" * 100_000 + SENTENCE),
        "nul": ARTICLE.replace(b"harbour", b"har\x00bour"),
        "empty": b"",
        "noise": bytes(range(256)) * 50,
    }
    for name, body in odd.items():
        (tmp_path / f"{name}.html").write_bytes(body)
    (tmp_path / "z.html").write_bytes(ARTICLE)
    facts = extract(Knobs(pages=str(tmp_path)), tmp_path)
    assert facts["pages"] == 5 and "z" in {r["url"] for r in out(tmp_path)}
    assert facts["removed: nested too deep"] == 1
    assert facts["kept"] + facts.get("removed: without text", 0) == 4


def test_another_language_is_removed_and_an_unknown_one_refused(tmp_path: Path, web: None) -> None:
    pytest.importorskip("py3langid", reason="the extra `web` is not installed")
    german = page(
        "".join(f"<p>{i}: Der Hafen war am Morgen still, und die Boote lagen am Steg und warteten auf die Flut.</p>" for i in range(6))
    )
    (tmp_path / "a.html").write_bytes(ARTICLE)
    (tmp_path / "b.html").write_bytes(german)
    facts = extract(Knobs(pages=str(tmp_path), languages=["en"]), tmp_path)
    assert [r["language"] for r in out(tmp_path)] == ["en"] and facts["removed: another language, or not sure"] == 1
    with pytest.raises(UserError, match="language 'xx' is not known"):
        extract(Knobs(pages=str(tmp_path), languages=["xx"]), tmp_path)


def test_what_cannot_work_is_one_sentence(tmp_path: Path) -> None:
    for knobs, say in (
        (Knobs(), "no pages were given"),
        (Knobs(pages=str(tmp_path / "no")), "no such file"),
        (Knobs(bench=str(tmp_path)), "not the benchmark"),
    ):
        with pytest.raises(UserError, match=say):
            extract(knobs, tmp_path)
