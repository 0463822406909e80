"""Choices of optimization, devices and held-out measurement."""

import dataclasses

from sleepnet.config import checks
from sleepnet.config.checks import FOLLOWS, MAX_SEED, ConfigError

GATHERS = ("block", "step")
SCHEDULES = ("constant", "cosine")
ON_BAD_STEP = ("stop", "skip", "rollback")
ON_SAVE_ERROR = ("stop", "continue")
MAX_B2 = 0.999999  # 1 - b2, by which a first step divides, is 0 in float32 soon after


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation and bookkeeping of one run."""

    steps: int = 1000
    batch_size: int = 64  # examples of a step, over all devices of all processes
    parts: int = 1  # of a batch, one after the other; gradients are summed (accumulation)
    seed: int = 0  # of the parameters; the data has the task's own

    muon_learning_rate: float = 2e-3  # of the blocks' matrices (paper: tuned at N = 1)
    adam_learning_rate: float = 5e-5  # of everything else
    # Of the blocks' matrices; and of embedding, learned positions and head. Norms, convolutions,
    # A_log and dt_bias never decay.
    muon_weight_decay: float = 0.0
    adam_weight_decay: float = 0.0
    adam_b2: float = 0.95
    # Our choice: after warm-up, constant or a cosine down to 0. By the step of the run, skipped
    # steps too.
    schedule: str = "constant"
    warmup_steps: int = 0  # linear, from 0
    # Share of steps, at the end, over which a constant falls to 0; at most those after warm-up.
    decay_fraction: float = 0.0
    clip_norm: float = 1.0  # global; our choice

    log_every: int = 20
    checkpoint_every: int = 200
    checkpoints_kept: int = 3
    evaluate_every: int = 0  # steps between held-out measurements; 0: never
    evaluate_examples: int = 256
    best_kept: int = 0  # checkpoints of the highest held-out accuracy, besides the newest

    # A bad step has a loss or gradient that is not finite, or one that is `spike_factor` times the
    # median of the last good steps (0: never). The run stops; or leaves the update out; or goes
    # back to a checkpoint at least `rollback_steps` before it, and on with the batches after it.
    on_bad_step: str = "stop"
    spike_factor: float = 0.0
    spike_window: int = 64
    skips_in_a_row: int = 10  # so many are allowed, then the run stops
    rollback_steps: int = 50
    rollbacks: int = 3  # likewise

    on_save_error: str = "stop"  # when a disk is full, say: stop, or continue and try again
    # After this many seconds without progress, such as a step, the stacks of all threads are
    # reported (0: never). With `stall_stops` the program then ends, so that a supervisor can
    # restart it; but not while it restores or compiles, which would take as long again.
    stall_seconds: float = 600.0
    stall_stops: bool = False

    def __post_init__(self):
        checks.normalize(self)
        checks.positive(
            self, "steps", "batch_size", "parts", "muon_learning_rate", "adam_learning_rate"
        )
        checks.positive(self, "clip_norm", "log_every", "checkpoint_every", "checkpoints_kept")
        checks.in_range(self, "seed", 0, MAX_SEED)
        checks.not_negative(self, "muon_weight_decay", "adam_weight_decay", "warmup_steps")
        checks.positive(
            self, "evaluate_examples", "spike_window", "rollback_steps", "skips_in_a_row"
        )
        checks.not_negative(self, "evaluate_every", "best_kept", "spike_factor", "rollbacks")
        checks.not_negative(self, "stall_seconds")
        checks.one_of(self, "schedule", SCHEDULES)
        checks.one_of(self, "on_bad_step", ON_BAD_STEP)
        checks.one_of(self, "on_save_error", ON_SAVE_ERROR)
        checks.in_range(self, "decay_fraction", 0.0, 1.0)
        checks.in_range(self, "adam_b2", 0.0, MAX_B2)
        checks.divides(self, "parts", "batch_size")
        if 0 < self.spike_factor <= 1:
            raise ConfigError(
                f"spike_factor must be above 1, or 0 for never; got {self.spike_factor}"
            )
        if self.best_kept and not self.evaluate_every:
            raise ConfigError(
                f"best_kept={self.best_kept} needs evaluate_every above 0: the best are known by "
                f"their held-out accuracy"
            )
        if self.evaluate_every % self.log_every:
            near = max(1, round(self.evaluate_every / self.log_every)) * self.log_every
            raise ConfigError(
                f"evaluate_every must be a multiple of log_every={self.log_every}; got "
                f"{self.evaluate_every}; the nearest is {near}"
            )
        if self.warmup_steps >= self.steps:
            raise ConfigError(
                f"warmup_steps must be below steps={self.steps}; got {self.warmup_steps}; the "
                f"nearest is {self.steps - 1}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out measurement."""

    examples: int = 1024
    batch_size: int = 128
    passes: tuple[int, ...] = (1, 2, 4)  # every N at which the model is evaluated
    streaming_examples: int = 16  # of them, how many also go through wake and sleep token by token

    def __post_init__(self):
        checks.normalize(self)
        checks.positive(self, "examples", "batch_size")
        checks.not_negative(self, "streaming_examples")
        if not self.passes or min(self.passes) < 1:
            raise ConfigError(f"passes must be integers of 1 or more; got {self.passes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How training lies on the devices of all processes; results depend on it only by rounding.

    The batch is split over data x fsdp devices. Parameters and optimizer state are split over fsdp,
    and copied over data.
    """

    data: int = FOLLOWS  # None: all devices that fsdp leaves
    fsdp: int = 1
    # Split parameters are gathered where a block runs, again in each pass and window; or once a
    # step, for which every device needs room for all of them and for their gradients.
    gather: str = "block"

    def __post_init__(self):
        checks.normalize(self)
        checks.positive(self, "fsdp")
        checks.positive_if_given(self, "data")
        checks.one_of(self, "gather", GATHERS)
