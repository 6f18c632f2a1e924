"""Questions about normalization, each answered by many training runs on real data."""

from syncnorm.tools.study.records import Claim, Study, StudyRow, StudySettings, View
from syncnorm.tools.study.runner import STUDIES, run

__all__ = ["STUDIES", "Claim", "Study", "StudyRow", "StudySettings", "View", "run"]
