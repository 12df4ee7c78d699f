"""The table of a report: what each column measures, as text and as Markdown."""

KNN_K = 20
FEW_LABELS = (10, 1)  # a class
DRAWS = 20
PIXEL_SIDE = 32
MANY_IMAGES = 20_000  # with more, probes on thousands of correlated pixels take minutes
PIXEL_COMPONENTS = 256
COLUMNS = {
    "knn": f"k-NN (k={KNN_K})",
    "linear": "linear, all labels",
    "labels10": "10 labels/class",
    "labels1": "1 label/class",
}
NOTES = (
    f"Top-1 accuracy on the test images, percent. k-NN: weighted vote of the {KNN_K} nearest "
    "training images by cosine. Linear: logistic regression on frozen features. Few labels: the "
    f"same, mean ± standard deviation over {DRAWS} draws of the labelled images, equal for all "
    f"rows. Raw pixels: the evaluation view, at most {PIXEL_SIDE} pixels a side, minus the mean "
    f"image ({PIXEL_COMPONENTS} principal components for more than {MANY_IMAGES:,} images). Random "
    "backbone: the run's network before its first step, batch norms as initialised (statistics of "
    "the data change its k-NN by about a point and lower its probes)."
)

# column -> (mean, standard deviation over draws)
Scores = dict[str, tuple[float, float | None] | None]


def terminal_table(scores: dict[str, Scores]) -> str:
    """Return the table with aligned columns, the best of each marked with a star."""
    return "\n".join("  ".join(row) for row in _aligned(cells(scores, "{}*", "{} ")))


def markdown_table(scores: dict[str, Scores]) -> str:
    """Return the table as Markdown, the best of each column in bold."""
    header, *rows = _aligned(cells(scores, "**{}**", "{}"))
    rule = ["-" * len(header[0]), *("-" * (len(cell) - 1) + ":" for cell in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def cells(scores: dict[str, Scores], best: str, other: str) -> list[list[str]]:
    """Return the table with its head; `best` and `other` format a column's best and the rest."""
    top = {
        column: max((row[column] or (-1.0, None))[0] for row in scores.values())
        for column in COLUMNS
    }
    table = [["", *COLUMNS.values()]]
    for name, row in scores.items():
        line = [name]
        for column in COLUMNS:
            value = row[column]
            mark = best if value and value[0] == top[column] else other
            line.append(mark.format(_number(value)))
        table.append(line)
    return table


def _number(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "-"
    return f"{value[0]:.1f}" if value[1] is None else f"{value[0]:.1f} ± {value[1]:.1f}"


def _aligned(table: list[list[str]]) -> list[list[str]]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    rows = []
    for name, *cells in table:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        rows.append([name.ljust(widths[0]), *right])
    return rows


def plain(scores: dict[str, Scores]) -> dict[str, object]:
    """Return the scores as JSON has them."""
    return {
        name: {
            column: value and {"mean": value[0], "std": value[1]} for column, value in row.items()
        }
        for name, row in scores.items()
    }
