"""The studies, by name."""

from __future__ import annotations

from syncnorm.tools.study import batch_size, dp_vs_ddp, fold, learning_rate, placement, sequence
from syncnorm.tools.study.question import Question

STUDIES: dict[str, Question] = {
    study.QUESTION.name: study.QUESTION for study in (batch_size, placement, learning_rate, dp_vs_ddp, sequence, fold)
}
