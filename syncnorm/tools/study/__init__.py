"""Questions about normalisation, each answered by many training runs on real data."""

from syncnorm.tools.study.records import Claim, Row, Settings, Study, View
from syncnorm.tools.study.registry import STUDIES
from syncnorm.tools.study.runner import run

__all__ = ["STUDIES", "Claim", "Row", "Settings", "Study", "View", "run"]
