"""The training loop: data in, steps, metrics and checkpoints out; resumes where it stopped."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from sleepnet import tasks
from sleepnet.config.model import check_trainable
from sleepnet.experiment import ExperimentConfig
from sleepnet.training import guard, multihost, sharding
from sleepnet.training.held_out import ACCURACY, HeldOut
from sleepnet.training.metrics import held_out_rows
from sleepnet.training.multihost import STOP, StopFlags, with_stop_flags
from sleepnet.training.profile import Profile
from sleepnet.training.program import Program, peak_memory
from sleepnet.training.run_io import Rollback, Rollbacks, RunFiles
from sleepnet.training.sharding import make_mesh
from sleepnet.training.step import TrainState, make_init, make_train_step, state_shapes
from sleepnet.training.throughput import Clock, Pace
from sleepnet.training.watch import Watch
from sleepnet.training.workdir import claim_workdir, locked


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and the checkpoint to return to."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands, after a row of metrics. goodput: see `Clock`."""

    step: int
    steps: int
    metrics: dict[str, float]
    tokens_per_second: float
    seconds_left: float
    goodput: float


def train(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    *,
    on_claimed: Callable[[], None] = lambda: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_notice: Callable[[str], None] = lambda _: None,
    on_phase: Callable[[str, int], None] = lambda *_: None,
    on_stall: Callable[[str], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    profile_steps: tuple[int, int] | None = None,
) -> TrainState:
    """Trains until `config.training.steps`, from the last good checkpoint if there is one.

    Interrupted and resumed, a run ends bit-equal to one that never stopped: example i is a
    function of (task seed, i), step t takes examples t B .. (t + 1) B - 1, and all else is in
    the checkpoint. All processes of `jax.distributed` call this alike; the first writes for all.

    Args:
      workdir: made if needed, on a disk that all processes share; holds config.json, checkpoints
        and metrics.
      on_claimed: called in the first process once the workdir is this run's, before it trains.
      on_progress: called with each row of metrics of training, in the first process.
      on_notice: called with what a person should know, such as a damaged checkpoint.
      on_phase: called with a phase and its step as they begin: "restore", "save", "compile",
        "data", "step", "evaluate". In "restore" and "compile" there is nothing to save: the state
        at the start lies on disk before the first step compiles.
      on_stall: called from another thread if nothing ends for `training.stall_seconds`; in
        "restore" and "compile", which may take that long, `on_notice` is.
      should_stop: polled between steps and evaluated batches; when it is true in one process, all
        save a checkpoint and return.
      profile_steps: the first and the last step of a profile, for workdir/profile.

    Raises:
      ConfigError: a mesh that does not fit the devices, or parameters that cannot be trained; no
        workdir is made.
      StorageError: a workdir that cannot be written, is in use, or is of another config. Raised
        in all processes, whichever of them it concerns.
      TrainingError: a bad step, or too many of them; see `training.on_bad_step`.
    """
    check_trainable(config.model)
    workdir = pathlib.Path(workdir)
    task = multihost.together(lambda: tasks.make(config.task), "the task cannot be made")
    config = dataclasses.replace(config, task=task.config)  # with what its files were
    mesh = make_mesh(config, jax.devices())
    with contextlib.ExitStack() as stack:

        def claim():
            stack.enter_context(locked(workdir))
            claim_workdir(config, workdir)
            on_claimed()

        multihost.from_first(claim)
        reports = _Reports(on_progress, on_notice, on_phase, on_stall)
        profile = Profile(workdir, profile_steps)
        run = _Run(config, task, mesh, workdir, reports, should_stop, profile)
        return stack.enter_context(contextlib.closing(run)).to_the_end()


def is_finished(config: ExperimentConfig, workdir: pathlib.Path, step: int) -> bool:
    """Whether a run that ended at a step has nothing left to do; all processes ask at once."""
    training = config.training
    if step < training.steps:
        return False
    return not training.evaluate_every or _was_measured(workdir, step)


def _was_measured(workdir, step) -> bool:
    """Whether process 0 sees what was held out, measured at a step."""
    return multihost.from_first(lambda: step in held_out_rows(workdir))


class _Reports(NamedTuple):
    progress: Callable[[Progress], None]
    notice: Callable[[str], None]
    phase: Callable[[str, int], None]
    stall: Callable[[str], None]


class _BadStep(Exception):  # noqa: N818, the program is not at fault
    """Unwinds the loop for a rollback."""

    def __init__(self, step, values):
        super().__init__(step)
        self.step, self.values = step, values


class _Run:
    """One start of a run; its methods stand in the order in which they are called."""

    def __init__(self, config, task, mesh, workdir, reports, should_stop, profile):
        self.config, self.training, self.task = config, config.training, task
        self.workdir = workdir
        self.reports, self.profile = reports, profile
        self.leads = jax.process_index() == 0
        self.mesh = mesh if mesh.size > 1 else None
        self.stop_flags = StopFlags(self.mesh, should_stop)
        self.held_out = HeldOut(config, self.task, self.mesh, self.stop_flags)
        self.pace = Pace(config, self.task)
        self.rollbacks = Rollbacks(workdir)
        self.files = RunFiles(self.training, workdir, reports.notice)
        self.program: Any = None
        self.clock = Clock(workdir)
        self.watch = Watch(
            workdir, self.clock, stall_seconds=self.training.stall_seconds,
            on_notice=reports.notice, on_stall=reports.stall,
        )  # fmt: skip

    def close(self):
        self.watch.close()
        self.profile.close()
        self.files.close()

    def to_the_end(self) -> TrainState:
        """Until all steps are done or a process is asked to stop; back over bad steps."""
        self.enter("restore", 0)
        state = self.restored()
        if state is None:
            state = make_init(self.config, self.mesh)()
            self.save(state, 0, wait=True)
        else:
            self.tell(f"resuming from step {int(state.step)}")
        if int(state.step) < self.training.steps or self.lacks_evaluation(int(state.step)):
            self.compile(state)
        while True:
            try:
                return self.go_on(state)
            except _BadStep as bad:
                bad.__traceback__ = None  # whose frames hold the bad state
                del state  # its buffers are gone, or hold what the bad step made
                state = self.rolled_back(bad)

    def restored(self) -> TrainState | None:
        return self.files.restore(state_shapes(self.config, self.mesh))

    def compile(self, state):
        """All programs, from their first batches: where nothing is lost by stopping at once."""
        self.enter("compile", int(state.step))
        step = make_train_step(
            self.config.model, self.training, self.task.window_passes(self.config.model.passes),
            self.task.scored_per_window, mesh=self.mesh, gather=self.config.mesh.gather,
        )  # fmt: skip
        placed = None
        if self.mesh is not None:
            places = jax.tree.map(lambda x: x.sharding, state)
            placed = places, sharding.replicated(self.mesh)
        program = jax.jit(with_stop_flags(step), donate_argnums=0, out_shardings=placed)
        like = state, next(self.batches(0, 1)), self.stop_flags.flags()
        self.program = Program("training step", program, like, self.tell)
        if self.training.evaluate_every:
            self.held_out.compile(state.params, self.tell)

    def go_on(self, state: TrainState) -> TrainState:
        """The loop. A step's metrics are looked at while the next one runs."""
        done, steps = int(state.step), self.training.steps
        if self.lacks_evaluation(done) and self.evaluate(state, done):
            return state
        waiting, stopping = None, False
        batches = self.batches(done, steps)
        while done < steps and not stopping:
            self.enter("data", done + 1)
            batch = next(batches)
            self.enter("step", done + 1)
            self.profile.before(done + 1)
            state, metrics = self.program(state, batch, self.stop_flags.flags())
            if waiting is not None:
                stopping = self.look_at(done, waiting)
            done, waiting = done + 1, metrics
            self.profile.after(done, metrics)
            self.pace.ticked()
            self.files.check()
            stopping = self.stop_flags.asked() or stopping
            if stopping or self.evaluates(done) or self.saves(done):
                stopping = self.look_at(done, waiting) or stopping
                stopping = self.pause(state, done, stopping)
                waiting = None
        return state

    def look_at(self, step: int, metrics) -> bool:
        """Waits for a step, judges it, writes its row; whether a process is asked to stop."""
        values = jax.device_get(metrics)
        if values["bad"]:
            self.bad_step(step, values)
        if step % self.training.log_every == 0 or step == self.training.steps:
            self.log(step, values)
        return bool(values[STOP])

    def bad_step(self, step: int, values):
        """Returns if the step was skipped."""
        found = f"{guard.fault(values)}, on batch {self.rollbacks.batch_of(step)}"
        policy = self.training.on_bad_step
        if policy == "skip" and values["bad_in_a_row"] <= self.training.skips_in_a_row:
            self.tell(f"step {step}: {found}; its update is left out")
            return
        if policy == "rollback" and len(self.rollbacks) < self.training.rollbacks:
            raise _BadStep(step, values)
        limit = {
            "stop": "",
            "skip": f" (training.skips_in_a_row={self.training.skips_in_a_row} before it, too)",
            "rollback": f" (after training.rollbacks={self.training.rollbacks})",
        }[policy]
        self.files.settle()
        checkpoints = self.files.checkpoints
        saved = [s for s in checkpoints.steps() if s < step]
        back = f"go back to {checkpoints.path(saved[-1])}" if saved else "none is older"
        raise TrainingError(
            f"step {step}: {found}{limit}; nothing of this step was saved: {back}. The same "
            f"command with another training.on_bad_step goes on from there; a lower learning "
            f"rate or training.clip_norm needs another --workdir"
        )

    def rolled_back(self, bad: _BadStep) -> TrainState:
        """The state to go on from after a bad step, and other batches to come."""
        self.enter("restore", bad.step)
        self.files.settle()
        checkpoints = self.files.checkpoints
        steps = multihost.from_first(checkpoints.steps)
        to = max(
            (s for s in steps if s <= bad.step - self.training.rollback_steps), default=steps[0]
        )
        loss, grad_norm = (float(bad.values[key]) for key in ("loss", "grad_norm"))
        batch = self.rollbacks.batch_of(bad.step)
        checkpoints.discard_after(to)  # first: they would be resumed without the rollback
        self.rollbacks.add(Rollback(bad.step, to, batch, loss, grad_norm))
        self.tell(
            f"step {bad.step}: {guard.fault(bad.values)}, on batch {batch}; going back to step "
            f"{to}, and on with batch {batch + 1}"
        )
        state = self.restored()
        assert state is not None, "it was on disk a moment ago"
        return state

    def log(self, step: int, values):
        """The row of a step."""
        row = self.pace.totals(step)
        row |= {key: float(values[key]) for key in ("loss", "accuracy", "grad_norm")}
        if self.training.on_bad_step == "skip":
            row["skipped"] = int(values["bad_so_far"])
        if self.training.on_bad_step == "rollback":
            row["rollbacks"] = len(self.rollbacks)
        speed = self.pace.tokens_per_second()
        timing = {**self.clock.timing(), "tokens_per_second": speed, **peak_memory()}
        self.files.write(step, row, timing)
        if self.leads:
            left = self.pace.seconds_for(self.training.steps - step)
            goodput = timing["goodput"]
            self.reports.progress(Progress(step, self.training.steps, row, speed, left, goodput))

    def pause(self, state, step: int, stopping: bool) -> bool:
        """Evaluates and saves as is due; whether to stop."""
        if self.evaluates(step) and not stopping:
            return self.evaluate(state, step)
        self.save(state, step, wait=stopping or step == self.training.steps)
        return stopping

    def evaluate(self, state, step: int) -> bool:
        """Measures what was held out, and saves; True if it was asked to stop meanwhile."""
        measured = self.held_out.measure(state.params, lambda: self.enter("evaluate", step))
        if measured is None:
            self.save(state, step, wait=True)
            return True
        self.files.write(step, measured, {})
        self.tell(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in measured.items()))
        if self.saves(step) or self.training.best_kept:
            self.save(state, step, wait=step == self.training.steps, metric=measured[ACCURACY])
        return False

    def save(self, state, step: int, *, wait: bool, metric: float | None = None):
        self.enter("save", step)
        self.files.save(state, wait=wait, metric=metric)

    def evaluates(self, step: int) -> bool:
        """Whether a step is followed by a held-out measurement."""
        every = self.training.evaluate_every
        return bool(every and step) and (step % every == 0 or step == self.training.steps)

    def lacks_evaluation(self, step: int) -> bool:
        """Whether the run ended during the measurement that follows a step."""
        return self.evaluates(step) and not _was_measured(self.workdir, step)

    def saves(self, step: int) -> bool:
        """Whether a step is followed by a checkpoint."""
        return step % self.training.checkpoint_every == 0 or step == self.training.steps

    def enter(self, phase: str, step: int):
        self.clock.enter(phase, step)
        self.reports.phase(phase, step)

    def tell(self, notice: str):
        """What is the same in all processes is told by the first."""
        if self.leads:
            self.reports.notice(notice)

    def batches(self, done: int, steps: int) -> Iterator[Any]:
        """What the steps done + 1 .. steps take, placed on the devices."""
        size = self.training.batch_size
        rows = None if self.mesh is None else sharding.local_rows(self.mesh, size)
        for first, count in self.rollbacks.spans(done, steps):
            for batch in tasks.batches(
                self.task, "train", size, first_batch=first, num_batches=count, rows=rows
            ):
                yield batch if self.mesh is None else sharding.place_batch(self.mesh, batch, size)
