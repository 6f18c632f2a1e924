"""Questions about normalisation, each answered by many training runs on real data."""

from syncnorm.study.records import Claim, Row, Settings, Study, View
from syncnorm.study.registry import STUDIES
from syncnorm.study.runner import run

__all__ = ["STUDIES", "Claim", "Row", "Settings", "Study", "View", "run"]
