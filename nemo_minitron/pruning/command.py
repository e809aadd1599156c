"""`minitron prune`: checks everything, runs the teacher where the cut needs it, then cuts."""

from nemo_minitron.artifacts import Manifest
from nemo_minitron.config import PruneConfig
from nemo_minitron.launch.ranks import rank
from nemo_minitron.pruning.measurements import open_teacher
from nemo_minitron.pruning.student import cut_student


def prune(config: PruneConfig) -> Manifest | None:
    """Makes the scores, the scan of blocks and the refit that the cut needs, each unless it is there, and the student.

    As one rank of several, started by torchrun or the like, only rank 0 cuts; the others return None.

    Raises:
        ConfigError, CheckpointError, DataError, EngineError: before any work.
        OutputExistsError: something else lies where a result goes.
    """
    teacher = open_teacher(config)
    if config.prune.needs_scores:
        from nemo_minitron.pruning.importance.scoring import score

        score(config, teacher)
    if config.needs_scan:
        from nemo_minitron.pruning.importance.scan import scan

        scan(config, teacher)
    if config.refits:
        from nemo_minitron.pruning.refit import refit

        refit(config, teacher)
    return cut_student(config, teacher) if rank() == 0 else None
