"""`unipool retrieval data`."""

from __future__ import annotations

import platform
from pathlib import Path

from unipool_jax.config.files import write_json
from unipool_jax.retrieval.folder import write_collection
from unipool_jax.retrieval.library import digest, library_tasks, standard_library
from unipool_jax.retrieval.requests import RetrievalDataRequest


def data_command(request: RetrievalDataRequest) -> int:
    """Write the tasks and print how large they are; raises FileError."""
    library = standard_library() if request.library is None else Path(request.library)
    prefix = "stdlib_" if request.library is None else ""
    for name, collection in library_tasks(library, request.seed).items():
        folder = Path(request.out) / f"{prefix}{name}"
        about = {"pairs": len(collection.queries), "digest": digest(collection), "python": platform.python_version()}
        write_collection(folder, collection)
        write_json(folder / "about.json", about | {"seed": request.seed}, indent=1)
        print(f"{folder}: {about['pairs']:,} pairs, Python {about['python']}, digest {about['digest']}")
    return 0
