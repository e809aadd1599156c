"""NeMo's strategy on ranks that have worked together before there is a trainer. Import it late: it imports NeMo."""

from nemo.lightning import MegatronStrategy
from nemo.lightning._strategy_lib import init_model_parallel


class JoinedStrategy(MegatronStrategy):
    """Sets Megatron up where the process group is there already, as after a teacher's pass; NeMo's own stops there."""

    def setup_distributed(self) -> None:
        super().setup_distributed()
        init_model_parallel(self.model)
        if self.data_sampler:
            self.data_sampler.setup(self.cluster_environment.global_rank())
