"""sleepnet: language models that sleep.

Wake is one cheap pass per token over a short window; sleep folds the window into
persistent fast weights by N offline passes. After Lee et al. 2026, arXiv 2605.26099.
"""

from sleepnet.config import ConfigError, ModelConfig
from sleepnet.cycle import parallel
from sleepnet.cycle.cache import init_state
from sleepnet.cycle.policies import FixedPasses, Spent, UntilStill, WithinSeconds, sleep_by
from sleepnet.cycle.rollout import Rollout, rollout
from sleepnet.cycle.sleep import sleep, sleep_from_tokens
from sleepnet.cycle.slices import IncrementalSleep, begin_sleep, continue_sleep, finish_sleep
from sleepnet.cycle.wake import wake
from sleepnet.inference.decoder import Decoder
from sleepnet.inference.engine import Drawn, Ended, Engine, EngineFull, Limits
from sleepnet.inference.sampling import Sampling
from sleepnet.inference.session import Session, SessionError
from sleepnet.nn.model import init_params
from sleepnet.types import WakeState, WindowCache

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Decoder",
    "Drawn",
    "Ended",
    "Engine",
    "EngineFull",
    "FixedPasses",
    "IncrementalSleep",
    "Limits",
    "ModelConfig",
    "Rollout",
    "Sampling",
    "Session",
    "SessionError",
    "Spent",
    "UntilStill",
    "WakeState",
    "WindowCache",
    "WithinSeconds",
    "begin_sleep",
    "continue_sleep",
    "finish_sleep",
    "init_params",
    "init_state",
    "parallel",
    "rollout",
    "sleep",
    "sleep_by",
    "sleep_from_tokens",
    "wake",
]
