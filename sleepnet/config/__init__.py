"""Every choice of the network and of training, as frozen dataclasses that validate themselves.

Each task has its own config, beside it in `sleepnet.tasks`; `sleepnet.experiment` binds them all.
"""

from sleepnet.config.checks import ConfigError
from sleepnet.config.model import ModelConfig
from sleepnet.config.training import EvaluationConfig, MeshConfig, TrainingConfig

__all__ = ["ConfigError", "EvaluationConfig", "MeshConfig", "ModelConfig", "TrainingConfig"]
