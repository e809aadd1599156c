"""The configuration of every stage: keyword-only dataclasses behind conf/*.yaml.

A dataclass states its fields and, in ``problems()``, what makes them wrong. ``validated`` collects the problems of a
whole tree and raises them at once. Names follow the NeMo 24.07 documentation, so that its overrides work unchanged.
"""

from nemo_minitron.config.base import (
    FORMATS,
    Config,
    all_problems,
    at_least,
    format_problems,
    one_of,
    output_format,
    validated,
)
from nemo_minitron.config.checkpoints import HF_SOURCE, NGC_SOURCE, ConvertConfig, DownloadConfig, InspectConfig
from nemo_minitron.config.data import DataConfig
from nemo_minitron.config.deployment import CalibrationDataConfig, QuantizeConfig
from nemo_minitron.config.flow import (
    DistillRecipeConfig,
    FlowConfig,
    FlowDataConfig,
    FlowModelConfig,
    FlowPruneConfig,
    HardwareConfig,
    InstructRecipeConfig,
    RecipeConfig,
)
from nemo_minitron.config.instructions import InstructConfig, PeftConfig
from nemo_minitron.config.planning import PLAN_STAGES, PlanConfig, PlanStudentConfig
from nemo_minitron.config.pruning import ExportConfig, InferenceConfig, PruneConfig, PruneModelConfig, PruneTargets
from nemo_minitron.config.training import (
    DistillConfig,
    EvaluateConfig,
    ExpManagerConfig,
    FinetuneConfig,
    HiddenLossConfig,
    KDConfig,
    ModelConfig,
    ModelDataConfig,
    OptimConfig,
    SchedConfig,
    StageConfig,
    TrainerConfig,
    layout_problems,
    missing_data,
)

__all__ = [
    "CalibrationDataConfig",
    "Config",
    "ConvertConfig",
    "DataConfig",
    "DistillConfig",
    "DistillRecipeConfig",
    "DownloadConfig",
    "EvaluateConfig",
    "ExpManagerConfig",
    "ExportConfig",
    "FORMATS",
    "FinetuneConfig",
    "FlowConfig",
    "FlowDataConfig",
    "FlowModelConfig",
    "FlowPruneConfig",
    "HF_SOURCE",
    "HardwareConfig",
    "HiddenLossConfig",
    "InferenceConfig",
    "InspectConfig",
    "InstructConfig",
    "InstructRecipeConfig",
    "KDConfig",
    "ModelConfig",
    "ModelDataConfig",
    "NGC_SOURCE",
    "OptimConfig",
    "PLAN_STAGES",
    "PlanConfig",
    "PlanStudentConfig",
    "PeftConfig",
    "PruneConfig",
    "PruneModelConfig",
    "PruneTargets",
    "QuantizeConfig",
    "RecipeConfig",
    "SchedConfig",
    "StageConfig",
    "TrainerConfig",
    "all_problems",
    "at_least",
    "format_problems",
    "layout_problems",
    "missing_data",
    "one_of",
    "output_format",
    "validated",
]
