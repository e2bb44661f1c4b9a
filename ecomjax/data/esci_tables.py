"""The official Shopping Queries data (Amazon ESCI): two parquet tables, joined row by row.

`shopping_queries_dataset_examples.parquet` has a row for each query and product,
`shopping_queries_dataset_products.parquet` the texts of each product of a locale. They are
converted once to two Arrow files, so that a product's texts are held once however many
queries it was judged for; an array says which row of the products is an example's own.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from ecomjax.data.cache import Cache
from ecomjax.data.progress import converting
from ecomjax.data.rows import LazyRows, Row, Rows, listed
from ecomjax.data.tables import ArrowRows, TableRows, parquet_batches, write
from ecomjax.errors import UserError

EXAMPLES = "shopping_queries_dataset_examples.parquet"
PRODUCTS = "shopping_queries_dataset_products.parquet"

JOINED_ON = ("product_id", "product_locale")
NOT_SHOWN = ("small_version", "large_version", "split")


class EsciTables:
    """The examples of the official tables, as rows with the columns of the folder form.

    Args:
        examples: the parquet file of the examples.
        products: the parquet file of the products.
        cache: holds what they are converted to.
        version: "large" or "small" for the examples of that version of the data.
        locale: such as "us", for the products of that locale.
    """

    splits = ("train", "test")

    def __init__(
        self, examples: Path, products: Path, cache: Cache, version: str = "", locale: str = ""
    ):
        self._paths = examples, products
        self._cache, self._version, self._locale = cache, version, locale
        for path in self._paths:
            if not path.is_file():
                raise UserError("no such file", str(path), "the official data are two tables")

    def rows(self, split: str) -> Rows:
        folder = self._cache.made("esci", self._digests(), self._convert)
        table = ArrowRows(folder / "examples.arrow", EXAMPLES)
        chosen = _equals(table, "split", split)
        if self._locale:
            chosen &= _equals(table, "product_locale", self._locale)
        if self._version:
            chosen &= _equals(table, f"{self._version}_version", 1)
        if not chosen.any():
            known = f"version '{self._version}', locale '{self._locale}'"
            raise UserError("no such examples", f"{self._paths[0]} {split}", f"asked for: {known}")
        return JoinedRows(
            ArrowRows(folder / "examples.arrow", str(self._paths[0]), NOT_SHOWN),
            ArrowRows(folder / "products.arrow", str(self._paths[1]), JOINED_ON),
            np.load(folder / "product.npy", mmap_mode="r"),
            np.flatnonzero(chosen),
        )

    def digest(self, split: str) -> str:
        parts = [*self._digests(), self._version, self._locale, split]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def _digests(self) -> list[str]:
        return [self._cache.digest(path) for path in self._paths]

    def _convert(self, folder: Path) -> None:
        needed = (*JOINED_ON, *NOT_SHOWN), JOINED_ON
        for path, columns in zip(self._paths, needed, strict=True):
            present = next(parquet_batches(path)).schema.names
            for name in sorted(set(columns) - set(present)):
                raise UserError(
                    f"missing column '{name}'", str(path), f"columns present: {listed(present)}"
                )
        tables = folder / "examples.arrow", folder / "products.arrow"
        with converting(self._paths[0].parent) as on_done:
            for source, target in zip(self._paths, tables, strict=True):
                on_done(write(target, parquet_batches(source), source))
            examples, products = (_keys(table) for table in tables)
            np.save(folder / "product.npy", _join(examples, products, self._paths[1]))


class JoinedRows(LazyRows):
    """Some of the examples, each with the columns of its product.

    Args:
        examples: all examples.
        products: all products.
        product: the row of each example's product; -1 where the products table has none.
        places: the examples to hand out, in this order.
    """

    def __init__(
        self,
        examples: TableRows,
        products: TableRows,
        product: Int[np.ndarray, "n"],
        places: Int[np.ndarray, "m"],
    ):
        self._examples, self._products = examples, products
        self._product, self._places = product, places

    def __len__(self) -> int:
        return len(self._places)

    def row(self, index: int) -> Row:
        place = int(self._places[index])
        row = self._examples.row(place)
        product = int(self._product[place])
        if product < 0:
            wanted = " ".join(str(row.values[name]) for name in JOINED_ON)
            raise UserError("product is not in the products table", row.where, f"add {wanted}")
        return Row({**row.values, **self._products.row(product).values}, row.where)

    def encoded(self, column: str) -> tuple[Int[np.ndarray, "m"], list[bytes]] | None:
        found = self._examples.encoded(column)
        return found and (found[0][self._places], found[1])


def _equals(table: TableRows, name: str, value: str | int) -> Bool[np.ndarray, "n"]:
    """Which rows have a value in a column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = pa.string() if isinstance(value, str) else pa.int64()
    column = pa.chunked_array(table.columns[name]).cast(kind)
    return pc.call_function("equal", [column, value]).fill_null(False).to_numpy()


def _keys(path: Path) -> Any:
    """What the tables are joined on, as one text a row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = ArrowRows(path, path.name).columns
    batches = zip(*(columns[name] for name in JOINED_ON), strict=True)
    texts = [[part.cast(pa.string()) for part in parts] for parts in batches]
    joined = [pc.call_function("binary_join_element_wise", [*parts, "\t"]) for parts in texts]
    return pa.chunked_array(joined)


def _join(examples: Any, products: Any, path: Path) -> Int[np.ndarray, "n"]:
    """The row of each example's product, or -1; UserError where a product comes twice."""
    import pyarrow.compute as pc

    known = products.combine_chunks()
    rows = functools.partial(pc.call_function, "index_in", options=pc.SetLookupOptions(known))
    first = rows([known]).fill_null(-1).to_numpy()
    twice = np.flatnonzero(first != np.arange(len(first)))
    if len(twice):
        shown = str(known[int(twice[0])].as_py()).replace("\t", " ")
        raise UserError(f"product '{shown}' comes twice", f"{path}:{twice[0] + 1}", "keep one")
    return rows([examples]).fill_null(-1).to_numpy()
