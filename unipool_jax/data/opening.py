"""Opens a token store: one built by this package, or a Megatron pair."""

from collections.abc import Sequence
from pathlib import Path

from unipool_jax.data import store_format
from unipool_jax.data.errors import DataError
from unipool_jax.data.megatron import MegatronTokenStore, megatron_prefix
from unipool_jax.data.store_reader import TokenStore, ZarrTokenStore, building_folder, check_tokenizer
from unipool_jax.data.tokenizer import Tokenizer, load_tokenizer


def open_store(
    path: str | Path,
    tokenizer: str | Tokenizer | None = None,
    split: Sequence[float] | None = None,
    split_order: str | None = None,
) -> TokenStore:
    """Opens a store built by this package, or the Megatron pair `PATH.bin`, `PATH.idx`.

    Args:
      path: store folder, or Megatron prefix with or without `.bin` or `.idx`.
      tokenizer: must be the one the store was built with; required for Megatron files, which do
        not record it.
      split, split_order: required (split) for Megatron files; other stores record them, and
        other values are an error.

    Raises:
      DataError: no store at `path`, a damaged or unfinished store, or a mismatch.
    """
    path = Path(path)
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if (path / store_format.MANIFEST).is_file():
        store: TokenStore = ZarrTokenStore(path, split, split_order)
        if loaded is not None:
            check_tokenizer(store, loaded)
        return store
    if (prefix := megatron_prefix(path)) is not None:
        if loaded is None or split is None:
            raise DataError(
                f"{path}: Megatron files record neither their tokenizer nor a split; "
                "set both, for example tokenizer=gpt2 split=[969,30,1]"
            )
        return MegatronTokenStore(prefix, loaded, split, split_order or "contiguous")
    if building_folder(path).is_dir() and not path.exists():
        raise DataError(f"{path}: this build was interrupted; repeat the same command to finish it")
    raise DataError(f"{path}: neither a token store nor the prefix of a Megatron .bin/.idx pair")
