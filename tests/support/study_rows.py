"""Rows of studies, made by hand."""

from syncnorm.tools.study import StudyRow


def rows(measure, cells):
    """Three seeds around the value of each cell: condition -> value."""
    return [
        StudyRow(dict(condition), seed, measure, value + 0.0001 * seed)
        for condition, value in cells.items()
        for seed in range(3)
    ]


def by_size(table):
    """Accuracies of batch-size: images per rank -> one for each norm."""
    names = ("BN", "BN, recalibrated", "SyncBN", "GN", "LN", "IN")
    return rows(
        "accuracy",
        {
            (("norm", name), ("images a rank", size)): accuracy
            for size, accuracies in table.items()
            for name, accuracy in zip(names, accuracies, strict=True)
        },
    )
