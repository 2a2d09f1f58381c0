"""The page of a registry: many checkpoints, whoever measured them, under one protocol a column."""

from collections.abc import Iterator, Sequence

from benchmarks.document import Block, Document, Picture, Section, Text
from benchmarks.records import Record, Registry
from benchmarks.standings import Standings
from benchmarks.tables import (
    card_blocks,
    command_blocks,
    curve_blocks,
    row_name,
    seeds_blocks,
    table_blocks,
)

PICTURES = 24  # a page of thousands stays light


def build_leaderboard(registry: Registry, standings: Standings) -> Document:
    """Write the document of some folders' records."""
    count, rows = len(registry.records), len(standings.rows)
    opening: list[Block] = [
        Text(
            f"{count:,} records of {rows:,} starts, under {len(standings.recipes)} protocols. "
            "Numbers stand in one column only if everything that decides them is equal.",
            "lede",
        )
    ]
    opening += [Text(hole, "hole") for hole in registry.holes]
    starts = {row_name(record): record.start for record in registry.records}
    sections = [
        Section("The table", table_blocks(standings)),
        Section("What the seeds can say", seeds_blocks(standings)),
        Section("Curves", curve_blocks(standings)),
        Section("The checkpoints", card_blocks(starts)),
        Section("Pictures", list(_pictures(registry.records))),
        Section("How each number was made", command_blocks(registry.records)),
    ]
    kept = [section for section in sections if section.blocks]
    return Document("MoCo Transfer: checkpoints side by side", opening, kept)


def _pictures(records: Sequence[Record]) -> Iterator[Block]:
    files = [
        (record, file) for record in records for file in sorted(record.file.parent.glob("*.png"))
    ]
    for record, file in files[:PICTURES]:
        caption = f"{record.recipe}, {row_name(record)}: {file.stem.replace('_', ' ')}"
        yield Picture(file.read_bytes(), str(file), caption)
    if len(files) > PICTURES:
        yield Text(f"{len(files) - PICTURES} more pictures lie beside their records", "note")
