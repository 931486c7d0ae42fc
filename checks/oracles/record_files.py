"""What the files of a run's data hold, read with the standard library's json and with pyarrow alone.

Sources: https://jsonlines.org (one JSON value a line, UTF-8), https://parquet.apache.org/docs/file-format, and for the
folders of `datasets` https://arrow.apache.org/docs/format/Columnar.html (streams, named in the folder's state.json).
"""

import glob
import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.ipc
import pyarrow.parquet

COLUMNS = ["context", "prompts", "responses"]
Content = tuple[str, tuple[str, ...], tuple[str, ...]]  # a document, its questions, their answers


def read_file(name: str, limit: int | None) -> list[Content] | None:
    """Read the records of a file, or of all files that a glob matches, in the order of their names.

    Args:
        limit: at most this many records.

    Returns:
        None where a path is a folder that `datasets` wrote with an order of its own.
    """
    paths = [Path(name)] if Path(name).exists() else [Path(found) for found in sorted(glob.glob(name, recursive=True))]
    if any(path.is_dir() and _is_reordered(path) for path in paths):
        return None
    values = (value for path in paths for value in _values(path))
    return [(value["context"], tuple(value["prompts"]), tuple(value["responses"])) for value in islice(values, limit)]


def _values(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of one path by its kind: a folder, Parquet, one JSON list, or a JSON object a line."""
    if path.is_dir():
        for file in json.loads((path / "state.json").read_text(encoding="utf-8"))["_data_files"]:
            with pyarrow.memory_map(str(path / file["filename"])) as source:
                yield from pyarrow.ipc.open_stream(source).read_all().select(COLUMNS).to_pylist()
        return
    if path.suffix == ".parquet":
        yield from pyarrow.parquet.read_table(path, columns=COLUMNS).to_pylist()
        return
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8-sig")
    if path.name.removesuffix(".gz").endswith(".json"):
        yield from json.loads(text)
    else:
        yield from (json.loads(line) for line in text.split("\n") if line.strip())


def _is_reordered(folder: Path) -> bool:
    """Tell whether a folder of `datasets` holds indices into its rows, such as those of a shuffle."""
    state = folder / "state.json"
    return not state.exists() or bool(json.loads(state.read_text(encoding="utf-8")).get("_indices_data_files"))
