"""sleepnet: language models that sleep.

Wake is one cheap pass per token over a short window; sleep folds the window into
persistent fast weights by N offline passes. After Lee et al. 2026, arXiv 2605.26099.
"""

from sleepnet import parallel
from sleepnet.cache import init_state
from sleepnet.config import ConfigError, ModelConfig
from sleepnet.decode import Decoder
from sleepnet.engine import Drawn, Ended, Engine, EngineFull, Limits
from sleepnet.nap import Nap, begin_sleep, continue_sleep, finish_sleep
from sleepnet.nn.model import init_params
from sleepnet.rollout import Rollout, rollout
from sleepnet.sampling import Sampling
from sleepnet.session import Session, SessionError
from sleepnet.sleep import sleep, sleep_from_tokens
from sleepnet.sleep_policies import FixedPasses, Spent, UntilStill, WithinSeconds, sleep_by
from sleepnet.types import WakeState, WindowCache
from sleepnet.wake import wake

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Decoder",
    "Drawn",
    "Ended",
    "Engine",
    "EngineFull",
    "FixedPasses",
    "Limits",
    "ModelConfig",
    "Nap",
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
