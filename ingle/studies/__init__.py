"""Studies: many runs of one config with other options, compared. A trial of a study is an ordinary run."""

from ingle.studies.method_study import MethodReport, MethodRequest, study_methods
from ingle.studies.rank_grid import RankRequest
from ingle.studies.rank_study import RankReport, study_rank
from ingle.studies.trials import Score, TaskScore, Trial, Trials

__all__ = [
    "MethodReport",
    "MethodRequest",
    "RankReport",
    "RankRequest",
    "Score",
    "TaskScore",
    "Trial",
    "Trials",
    "study_methods",
    "study_rank",
]
