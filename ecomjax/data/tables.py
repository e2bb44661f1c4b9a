"""Arrow files: written once from csv, parquet or a stream, then read row by row by memory map."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from jaxtyping import Int

from ecomjax.data.cache import check_growth
from ecomjax.data.progress import counting
from ecomjax.data.rows import LONGEST_ROW, LazyRows, Row
from ecomjax.errors import UserError

BATCH = 2048
"""Rows of a record batch: few enough to be held while files are converted."""

BATCH_BYTES = 2**25
"""Text from which a batch has fewer rows."""

LINE = "ecomjax:line"
"""Column of the line that a row of a csv file starts on."""

FAULT = "ecomjax:fault"
"""Column of what is wrong with a row that could not be read; null where nothing is."""


class TableRows(LazyRows):
    """Rows of an Arrow table, each made of the few bytes that it takes in the file.

    Args:
        batches: the record batches of the table, at least one.
        what: file or data set that the rows are from, as errors name it.
        hidden: columns that rows do not have.
    """

    def __init__(self, batches: Sequence[Any], what: str, hidden: Collection[str] = ()):
        self._what = what
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        names = [name for name in batches[0].schema.names if name not in hidden]
        columns = {name: [batch.column(name) for batch in batches] for name in names}
        self._lines, self._faults = columns.pop(LINE, None), columns.pop(FAULT, None)
        self.columns = columns
        """Column name to its array in each batch."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> Row:
        batch, place = self._find(index)
        line = self._lines[batch][place].as_py() if self._lines else index + 1
        where = f"{self._what}:{line}"
        if self._faults and (fault := self._faults[batch][place].as_py()):
            raise UserError(fault, where, "mend the row")
        return Row(self.values(index, where), where)

    def values(self, index: int, where: str) -> dict[str, Any]:
        """The columns of row `index`; `where` is for the error if one cannot be read."""
        batch, place = self._find(index)
        values, name = {}, ""
        try:
            for name, arrays in self.columns.items():
                values[name] = arrays[batch][place].as_py()
        except UnicodeDecodeError as error:
            byte = f"byte {error.start + 1} is {error.object[error.start]:#04x}"
            problem = f"text in column '{name}' is not UTF-8 ({byte})"
            raise UserError(problem, where, "write the file anew in UTF-8") from None
        except (ValueError, OverflowError) as error:
            problem = f"value in column '{name}' cannot be read ({error})"
            raise UserError(problem, where, "write the file anew") from None
        return values

    def encoded(self, column: str) -> tuple[Int[np.ndarray, "n"], list[bytes]] | None:
        import pyarrow as pa

        kinds = (pa.string(), pa.large_string(), pa.int64())
        if column not in self.columns or self.columns[column][0].type not in kinds:
            return None
        texts = pa.chunked_array(self.columns[column]).cast(pa.string()).fill_null("")
        found: Any = texts.dictionary_encode().combine_chunks()
        return found.indices.to_numpy(), found.dictionary.cast(pa.binary()).to_pylist()

    def _find(self, index: int) -> tuple[int, int]:
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return batch, int(index - self._starts[batch])


class ArrowRows(TableRows):
    """The rows of an Arrow file that `write` wrote, by memory map."""

    def __init__(self, path: Path, what: str, hidden: Collection[str] = ()):
        import pyarrow as pa

        self._arguments = path, what, hidden
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(n) for n in range(reader.num_record_batches)]
        super().__init__(batches, what, hidden)

    def __reduce__(self) -> Any:
        return type(self), self._arguments


def write(path: Path, batches: Iterable[Any], source: Path | None = None) -> int:
    """Writes record batches of one schema as an Arrow file; returns the number of rows.

    Args:
        path: new file.
        batches: none for a table without rows or columns.
        source: the file they are from, if `check_growth` is to watch what comes of it.
    """
    import pyarrow as pa

    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        first = pa.RecordBatch.from_pylist([], pa.schema([]))
    rows = 0
    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, first.schema) as writer:
            for batch in itertools.chain([first], batches):
                writer.write_batch(batch)
                rows += batch.num_rows
                if source:
                    check_growth(source, file.tell())
    except pa.ArrowException as error:
        raise UserError(
            f"table cannot be written as Arrow ({error})", str(source or path), "use plain columns"
        ) from None
    return rows


def parquet_batches(path: Path) -> Iterator[Any]:
    """The record batches of a parquet file, read in bounded memory; at least one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # A buffer makes pyarrow read page by page, where a row group may be the whole file.
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            schema, found = file.schema_arrow, file.metadata
            if len(set(schema.names)) < len(schema.names):
                raise UserError("columns of one name", str(path), "give each a name of its own")
            plain = pa.schema([(field.name, _plain(field.type)) for field in schema])
            yield pa.RecordBatch.from_pylist([], plain)
            groups = (found.row_group(n) for n in range(found.num_row_groups))
            size = sum(group.total_byte_size for group in groups) / max(found.num_rows, 1)
            rows = int(min(max(BATCH_BYTES / max(size, 1), 1), BATCH))
            with counting(found.num_rows, f"reading {path.name}") as on_read:
                for batch in file.iter_batches(rows, use_threads=False):
                    yield batch.cast(plain)
                    on_read(batch.num_rows)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"parquet file cannot be read ({reason})", str(path), "fetch it again"
        ) from None


def _plain(kind: Any) -> Any:
    """A type without a dictionary, of which an Arrow file has one for all batches."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def csv_batches(path: Path) -> Iterator[Any]:
    """The record batches of a csv file with a header, all columns text; at least one.

    An empty cell is null. A row that cannot be read is kept with its fault.
    """
    import pyarrow as pa

    records = _csv_records(path)
    _, names, fault = next(records, (1, [], "file holds no rows"))
    fault = fault or _csv_fault(names, len(names))
    if fault or not all(names) or len(set(names)) < len(names):
        fault = fault or "header with empty or equal names"
        raise UserError(fault, f"{path}:1", "begin with a line that names the columns")
    kinds = [*((name, pa.string()) for name in names), (LINE, pa.int64()), (FAULT, pa.string())]
    schema = pa.schema(kinds)
    made, size = [], 0
    for line, cells, fault in records:
        fault = fault or _csv_fault(cells, len(names))
        cells = [None] * len(names) if fault else [cell or None for cell in cells]
        made.append({**dict(zip(names, cells, strict=True)), LINE: line, FAULT: fault})
        size += sum(len(cell or "") for cell in cells)
        if len(made) == BATCH or size > BATCH_BYTES:
            yield pa.RecordBatch.from_pylist(made, schema)
            made, size = [], 0
    yield pa.RecordBatch.from_pylist(made, schema)


def _csv_records(path: Path) -> Iterator[tuple[int, list[str], str | None]]:
    """First line, cells and fault of each record; bytes that are not UTF-8 are half surrogates."""
    csv.field_size_limit(max(LONGEST_ROW, csv.field_size_limit()))
    with (
        path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
        counting(path.stat().st_size, f"reading {path.name}", "B") as on_read,
    ):
        reader = csv.reader(_lines(file, path, on_read), strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, [], f"row is not csv ({error}, up to line {reader.line_num})"
            else:
                if cells:
                    yield line, cells, None


def _lines(file: TextIO, path: Path, on_read: Callable[[int], None]) -> Iterator[str]:
    for number in itertools.count(1):
        line = file.readline(LONGEST_ROW + 1)
        if not line:
            return
        if len(line) > LONGEST_ROW:
            remedy = f"a row may have up to {LONGEST_ROW:,} bytes"
            raise UserError("line too long", f"{path}:{number}", remedy)
        on_read(len(line))
        yield line


def _csv_fault(cells: list[str], wanted: int) -> str | None:
    """What is wrong with the cells of a record."""
    if len(cells) != wanted:
        return f"row of {len(cells)} cells under a header of {wanted}"
    text = "".join(cells)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"row is not UTF-8 (a byte is {ord(text[error.start]) & 0xFF:#04x})"
    return "row holds NUL" if "\0" in text else None
