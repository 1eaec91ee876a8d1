"""Record data sets as Hugging Face's `datasets` itself leaves them on disk.

Run once, in an environment that has it; the tests read only the folders it writes:

    pip install datasets==5.2.0
    python tests/oracles/record_saved_datasets.py

Source: interp_jax.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import shutil
from pathlib import Path

import datasets

HERE = Path(__file__).parent / "saved_datasets"


def rows(kind: str, n: int) -> datasets.Dataset:
    """Rows that say what they are; one of them is empty, one has no text."""
    texts: list[str | None] = [f"{kind} document {number}: é, 猫." for number in range(n)]
    texts[1:3] = ["", None]
    return datasets.Dataset.from_dict({"id": list(range(n)), "text": texts})


def main() -> None:
    """Write the folders anew."""
    shutil.rmtree(HERE, ignore_errors=True)
    (HERE / "hub" / "data").mkdir(parents=True)
    datasets.DatasetDict(train=rows("train", 7), test=rows("test", 4)).save_to_disk(
        HERE / "splits", num_shards={"train": 2, "test": 1}
    )
    # A selection is saved as the whole, and which rows of it.
    picked = rows("picked", 9).select([8, 3, 5, 2, 0])
    picked.save_to_disk(HERE / "picked")
    rows("parquet", 5).to_parquet(HERE / "hub" / "data" / "train-00000-of-00001.parquet")


if __name__ == "__main__":
    main()
