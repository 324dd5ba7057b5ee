"""Pages out of WARC files, HTML files and folders of both; what is damaged, too large or no page is counted."""

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modelwright.core.errors import UserError
from modelwright.curate.kernels.pages import LARGEST, needed


@dataclass(frozen=True)
class Page:
    """One page as it was sent."""

    url: str
    body: bytes
    content_type: str = ""
    date: str = ""


_ENDS = (".warc", ".warc.gz", ".html", ".htm", ".html.gz")


class Archive:
    """The pages of a file or folder in the order of names. `dropped` counts what could not be read, by file."""

    def __init__(self, path: str):
        self.path = Path(path).expanduser()
        self.files = (
            [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.name.endswith(_ENDS) and p.is_file())
        )
        if not self.files:
            why = f"no file there ends in {', '.join(_ENDS)}" if self.path.exists() else "there is no such file or folder"
            raise UserError(f"no pages at {path}", why, "check the path")
        self.dropped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Page]:
        for file in self.files:
            yield from self._warc(file) if ".warc" in file.name else self._html(file)

    def _drop(self, why: str, file: Path) -> None:
        self.dropped[f"{why} ({file.name})"] += 1

    def _html(self, file: Path) -> Iterator[Page]:
        try:
            with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as opened:
                body = opened.read(LARGEST + 1)
        except (OSError, EOFError, zlib.error):
            return self._drop("damaged files", file)
        if len(body) > LARGEST:
            return self._drop(f"pages above {LARGEST >> 20} MiB", file)
        yield Page(file.name.split(".")[0], body)
        return None

    def _warc(self, file: Path) -> Iterator[Page]:
        warc = needed("fastwarc.warc")
        responses = last = 0
        with open(file, "rb") as stream:
            try:
                for record in warc.ArchiveIterator(stream, record_types=warc.WarcRecordType.response, parse_http=True):
                    responses, last = responses + 1, record.stream_pos
                    headers = record.http_headers
                    kind = (record.http_content_type or "").lower()
                    if headers is None or headers.status_code not in (None, 200) or "html" not in kind:
                        self._drop("responses that are no pages", file)
                        continue
                    body = record.reader.read(LARGEST + 1)
                    if len(body) <= LARGEST and "gzip" in (headers.get("Content-Encoding") or ""):
                        body = _unpack(body)
                    if len(body) > LARGEST:
                        self._drop(f"pages above {LARGEST >> 20} MiB", file)
                    elif len(body) < _declared(headers) and not headers.get("Content-Encoding"):
                        self._drop("pages cut short", file)
                    else:
                        url, date = record.headers.get("WARC-Target-URI") or "", record.headers.get("WARC-Date") or ""
                        yield Page(url, body, headers.get("Content-Type") or "", date)
            except (OSError, ValueError, EOFError, zlib.error, RuntimeError):
                self._drop("rest of a damaged file", file)
                return
        if file.suffix == ".gz" and _cut_off(file, last):
            self._drop("rest of a damaged file", file)
        elif not responses:
            self._drop("files without a response", file)


def _cut_off(file: Path, start: int) -> bool:
    """Whether the gzip members from `start` on end before the last is whole; the reader of archives does not say so."""
    with open(file, "rb") as stream:
        stream.seek(start)
        member, rest = zlib.decompressobj(31), stream.read(1 << 20)
        whole = not rest
        while rest:
            try:
                member.decompress(rest, LARGEST)
            except zlib.error:
                return True
            whole = member.eof
            rest = member.unused_data if whole else member.unconsumed_tail
            rest = rest or stream.read(1 << 20)
            if whole:
                member = zlib.decompressobj(31)
        return not whole


def _declared(headers: object) -> int:
    length = headers.get("Content-Length") or ""  # type: ignore[attr-defined]
    return int(length) if length.isdigit() else 0


def _unpack(body: bytes) -> bytes:
    """A gzipped body, at most one byte above the largest page; as it is where it is no gzip."""
    try:
        return zlib.decompressobj(31).decompress(body, LARGEST + 1)
    except zlib.error:
        return body
