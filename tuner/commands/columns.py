"""Rows of text under each other, for a terminal, a pipe and a log alike."""

from collections.abc import Sequence

from rich.cells import cell_len


def align_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()
) -> list[str]:
    """The lines of a table without borders, two spaces between columns.

    Args:
        header: the names of the columns.
        rows: the cells of each row, as many as the header has.
        right: the columns that are aligned to the right, counted from 0.
    """
    table = [list(header), *map(list, rows)]
    widths = [max(cell_len(row[i]) for row in table) for i in range(len(header))]
    lines = []
    for row in table:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            blanks = " " * (width - cell_len(cell))
            cells.append(blanks + cell if i in right else cell + blanks)
        lines.append("  ".join(cells).rstrip())
    return lines
