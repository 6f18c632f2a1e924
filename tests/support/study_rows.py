"""Rows of studies, made by hand."""

import torch

from syncnorm.tools.common.decision import Rule
from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.study import STUDIES, Study, StudyRow, StudySettings, View

NUM_IMAGES = 10_000


def accuracy_row(condition, seed, accuracy, measure="accuracy"):
    """An accuracy of 10,000 images, of which all networks find the same hard."""
    return StudyRow.of_images(condition, seed, measure, torch.arange(NUM_IMAGES) < round(NUM_IMAGES * accuracy))


def rows(measure, cells):
    """Three seeds around the value of each cell, condition -> value; with the results per image of accuracies."""
    made = []
    for condition, value in cells.items():
        for seed in range(3):
            by_seed = value + 0.0001 * seed
            if "accuracy" in measure:
                made.append(accuracy_row(dict(condition), seed, by_seed, measure))
            else:
                made.append(StudyRow(dict(condition), seed, measure, by_seed))
    return made


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


def by_hand():
    """A record of batch-size, whose last cell is missing."""
    made = tuple(by_size({1: (0.9, 0.91, 0.92, 0.93, 0.94, 0.95), 16: (0.9, 0.9, 0.92, 0.91, 0.9, 0.9)}))
    question = STUDIES["batch-size"]
    return Study(
        question=question.question,
        claim=question.claim,
        settings=StudySettings("batch-size", 2, 3, 40),
        notes={"data": "digits"},
        rows=made[:-3],
        views=(*question.views(made), View("By norm", "accuracy", "images a rank", "norm", {"norm": "GN"}, "number")),
        findings=tuple(question.find(made, Rule())),
        hardware=Hardware("cpu", "A processor", "gloo", 2, 1),
        syncnorm_version="0.1.0",
        torch_version="2.13.0",
        python_version="3.11",
        date="2024-01-01T00:00:00+00:00",
        command="syncnorm study batch-size",
        wall_seconds=61.0,
    )
