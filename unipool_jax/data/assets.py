"""Files shipped with the package: the demo corpus, its tokenizer and the GPT-2 vocabulary."""

import hashlib
import lzma
from pathlib import Path

from unipool_jax.data.errors import DataError

ASSET_FOLDER = Path(__file__).parent / "assets"

# sha256 of the uncompressed content, so that the files can be recompressed with another version of xz.
SHA256 = {
    "sotu.jsonl": "f037b0d484c2063fc15adcb1f2eb956793ba838c0f2437aa7fc0b692aa6e5e3c",
    "demo_tokenizer.json": "d5af1dc108c2dc0c075b317cc9ae8b92b064ea8a6b1879d7fa3359fce4562368",
    "gpt2_encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "gpt2_vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def read_asset(name: str) -> bytes:
    """The uncompressed bytes of the packaged file `name`, checked against its known sha256.

    Raises:
      DataError: the file is missing, damaged or edited.
    """
    path = ASSET_FOLDER / f"{name}.xz"
    try:
        content = lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot read this packaged file ({error}); reinstall") from error
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise DataError(f"{path}: content differs from the packaged file; reinstall")
    return content


def demo_corpus_path() -> Path:
    """Path of the demo corpus: 233 State of the Union addresses, 1790-2021, as `jsonl.xz`."""
    return ASSET_FOLDER / "sotu.jsonl.xz"
