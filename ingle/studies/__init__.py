"""Studies: many runs of one config with other options, compared. A trial of a study is an ordinary run."""

from ingle.studies.rank_grid import RankRequest
from ingle.studies.rank_study import RankReport, study_rank
from ingle.studies.trials import Score, Trial, Trials

__all__ = ["RankReport", "RankRequest", "Score", "Trial", "Trials", "study_rank"]
