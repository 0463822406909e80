"""A pod's life: asked for, waited for, furnished, run, followed, and given back."""

import contextlib
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from launch.common import cli
from launch.common.busy import WHO
from launch.tpu_pod import commands, gcloud, states
from launch.tpu_pod.commands import Pod
from launch.tpu_pod.gcloud import PodError

# Exit codes.
USER_ERROR = 2  # what a message explains
ABORTED = 128 + 6  # by JAX, in the processes that are left when another one ends
STOPPED = (128 + 15, 128 + 2)  # a machine that is taken away sends SIGTERM first
PATIENCE = 10  # questions that may go unanswered


class Life:
    """Of one pod.

    Args:
      say: takes lines for people.
      pause: seconds between two questions for its state.
    """

    def __init__(self, pod: Pod, say: Callable[[str], None], pause: float = 15.0):
        self.pod, self._say, self._pause = pod, say, pause
        self._answered = False

    def live(self, out: pathlib.Path | None, *, keep: bool, resubmit: int, doctor: bool) -> int:
        """All of it; the exit code of the command.

        Args:
          out: a folder here for the results; None: they stay where they are.
          keep: the machines stay when the command has ended.
          resubmit: how often to run it again when it was cut short, on new machines if need be.
        """
        with self._never_silent():
            code = self._furnish_and_run(doctor)
            while code is None and resubmit > 0:
                self._say(f"it was cut short; running it again ({resubmit} left)")
                resubmit -= 1
                code = self._furnish_and_run(doctor)
            if code is None:
                if not self._taken_away():
                    gcloud.show(self.pod.last_words())
                self._say("it was cut short: the same command goes on from the last checkpoint; "
                          "--resubmit=10 does so by itself")  # fmt: skip
                self.give_back()
                return 1
            if code:
                gcloud.show(self.pod.last_words())
            if out is not None:
                self._fetch(out)
            if keep:
                self._say(f"{self.pod.name} is kept, and costs; {self._how_to_delete()}")
            else:
                self.give_back()
            return code

    def give_back(self):
        """Deletes the machines and the request for them."""
        self._say(f"deleting {self.pod.name}")
        gcloud.do(self.pod.delete())

    def state(self) -> str:
        """Of the request, or NOT_FOUND."""
        return self._state_of(self.pod.describe())

    def _state_of(self, describe: list[str]) -> str:
        """Once it has answered, gcloud may fail for a while: nothing is concluded from that."""
        for _ in range(PATIENCE if self._answered else 1):
            result = gcloud.ask(describe)
            if result.code == 0 or "NOT_FOUND" in result.errors:
                self._answered = True
                if result.code:
                    return states.NOT_FOUND
                return result.output or states.UNSPECIFIED
            time.sleep(self._pause)
        raise PodError(gcloud.explain(describe, result))

    @contextlib.contextmanager
    def _never_silent(self) -> Iterator[None]:
        """Whoever leaves early is told what still runs, and costs."""
        try:
            yield
        except BaseException as error:
            reason = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            self._say(f"{reason}: {self.pod.name} may still run, and cost. The same command goes "
                      f"on with it; {self._how_to_delete()}")  # fmt: skip
            raise

    def _how_to_delete(self) -> str:
        return f"to delete it: {gcloud.text(self.pod.delete())}"

    def _furnish_and_run(self, doctor: bool) -> int | None:
        """The exit code of the command, or None if it was cut short."""
        self._obtain()
        try:
            if self._status() == "running":
                self._say("the command already runs there; following it")
            else:
                self._furnish(doctor)
                gcloud.do(self.pod.start())
            code = self._follow()
            if code in (0, USER_ERROR) or not self._chips_are_busy():
                return code
            gcloud.show(self.pod.free_chips())
            gcloud.do(self.pod.start())
            return self._follow()
        except PodError:
            if self._taken_away():
                return None
            raise

    def _obtain(self):
        """Waits until the machines are there, asking for them where nobody has."""
        last, asked = "", False
        while True:
            state, step = self._look()
            if step == states.USE:
                return
            if state == "FAILED" and asked:
                raise PodError(f"{self.pod.name} was refused (state FAILED): see "
                               f"{gcloud.text(self.pod.describe()[:-1])}")  # fmt: skip
            if step == states.REPLACE:
                self._say(f"{self.pod.name} is over ({state}): deleting what is left of it")
                self._delete()
                asked = False
            elif step == states.ASK and not asked:
                self._say(f"asking for {self.pod.accelerator.name} in {self.pod.zone}")
                gcloud.do(self.pod.create())
                asked = True
            elif state != last and step == states.WAIT:
                self._say(f"{self.pod.name}: {state}")
            last = state
            time.sleep(self._pause)

    def _look(self) -> tuple[str, str]:
        """Return the state of the request (once ACTIVE: of its machines), and what to do."""
        state = self.state()
        step = states.step(states.REQUESTS, self.pod.name, state)
        if step == states.USE:
            state = self._state_of(self.pod.node())
            step = states.step(states.MACHINES, self.pod.name, state)
        return state, step

    def _delete(self):
        """Delete a request that is over; machines that are changing may refuse for a while."""
        for _ in range(PATIENCE):
            result = gcloud.ask(self.pod.delete())
            if result.code == 0 or "NOT_FOUND" in result.errors:
                return
            if self._state_of(self.pod.node()) not in states.CHANGING:
                break
            time.sleep(self._pause)
        raise PodError(gcloud.explain(self.pod.delete(), result))

    def _furnish(self, doctor: bool):
        """The code, its environment and the bucket, on every machine."""
        with tempfile.TemporaryDirectory() as folder:
            archive = pathlib.Path(folder) / f"{commands.CODE}.tar.gz"
            gcloud.do(commands.archive(archive))
            self._say("copying the last commit to all machines")
            gcloud.do(self.pod.copy(archive))
        gcloud.show(self.pod.free_chips())
        gcloud.do(self.pod.unpack())
        self._say("installing")
        gcloud.do(self.pod.install())
        if self.pod.bucket:
            gcloud.do(self.pod.mount())
        if doctor and gcloud.show(self.pod.doctor()):
            raise PodError("the doctor found something wrong (above); --nodoctor goes on anyway")

    def _follow(self) -> int | None:
        """The exit code of the command; None: it, or its machine, ended and may be tried again."""
        while True:
            gcloud.show(self.pod.follow())
            status = self._status()
            if status != "running":
                break
            self._say("the connection was lost; following again")
            time.sleep(self._pause)
        return 0 if status == "ended 0" else self._judge(self._ends() or [status])

    def _ends(self) -> list[str]:
        """Of the command on all machines, as `Pod.status` has it; when it has ended on one, JAX
        aborts it on the others, some minutes later."""
        ends = []
        for _ in range(PATIENCE):
            result = gcloud.ask(self.pod.status("all"))
            ends = result.output.splitlines()
            if result.code == 0 and "running" not in ends:
                break
            if self._taken_away():
                return [*ends, "free"]
            time.sleep(self._pause)
        return ends

    def _judge(self, ends: Sequence[str]) -> int | None:
        """The exit code, or None: what ended it may be over, and it may be tried again."""
        codes = [int(end.split()[1]) for end in ends if end.startswith("ended ")]
        code = cause(codes)
        lost = "free" in ends or self._taken_away(patient=code in STOPPED)
        if code is not None and (code == USER_ERROR or not lost):
            return code
        if codes:
            self._say(f"exit codes of the machines: {', '.join(map(str, codes))}")
        if "running" in ends and not lost:
            raise PodError("the command has ended on one machine and still runs on another: see "
                           f"{gcloud.text(self.pod.last_words())}")  # fmt: skip
        return None

    def _chips_are_busy(self) -> bool:
        """Report whether the command found the chips of a machine held by another process."""
        if self._taken_away():
            return False
        held = gcloud.ask(self.pod.who_holds_chips()).output
        if held:
            self._say(
                f"another process holds TPU chips, which serve one process at a time:\n{held}\n"
                f"processes of an earlier command are ended, and this one is tried again; end any "
                f"other process yourself: {gcloud.text(self.pod.ssh(WHO))}"
            )
        return bool(held)

    def _status(self) -> str:
        """Of the command, from a machine that may not answer at once.

        One that restarts has as long as that takes.
        """
        unanswered = 0
        while unanswered < PATIENCE:
            result = gcloud.ask(self.pod.status())
            if result.output == "running" or result.output.startswith(("ended ", "free")):
                return result.output
            machines = self._machines()
            if machines == states.REPLACE:
                return "free"
            unanswered += machines == states.USE
            time.sleep(self._pause)
        raise PodError(gcloud.explain(self.pod.status(), result))

    def _taken_away(self, patient: bool = False) -> bool:
        """Whether the machines are gone or restarting: then nothing runs on them any more.

        Args:
          patient: look several times; machines whose command was stopped may be gone soon.
        """
        for _ in range(4 if patient else 1):
            if self._machines() != states.USE:
                return True
            if patient:
                time.sleep(self._pause)
        return False

    def _machines(self) -> str:
        """Return what to do about machines that were there: use, replace or wait for them."""
        state = self.state()
        if state == states.UNSPECIFIED:
            return states.WAIT
        if state != "ACTIVE":
            return states.REPLACE
        node = self._state_of(self.pod.node())
        return states.step(states.MACHINES, self.pod.name, node)

    def _fetch(self, out: pathlib.Path):
        out.mkdir(parents=True, exist_ok=True)
        self._say(f"fetching the results into {out}")
        gcloud.do(self.pod.fetch(out))


def cause(codes: Sequence[int]) -> int | None:
    """Of the exit codes of all machines, the one that tells why; None: the command may go on.

    A process that stands still, or that has an error of its own, makes JAX abort the others.
    """
    own = [code for code in codes if code not in (0, ABORTED, *STOPPED)]
    if USER_ERROR in own:
        return USER_ERROR
    if cli.TRY_AGAIN in own:
        return None
    if own or ABORTED in codes:
        return own[0] if own else None
    return max(codes, default=None)


def plan(pod: Pod, out: pathlib.Path | None, *, keep: bool, doctor: bool):
    """The commands of a life in which nothing goes wrong, each with what it is for."""
    archive = pathlib.Path(f"{commands.CODE}.tar.gz")
    yield "is it there?", pod.describe()
    yield "if not, ask for it", pod.create()
    yield "until ACTIVE", pod.describe()
    yield "are its machines there?", pod.node()
    yield "what of the command?", pod.status()
    yield "if not: the code", commands.archive(archive)
    yield "to all machines", pod.copy(archive)
    yield "end what an earlier command left there", pod.free_chips()
    yield "unpacked", pod.unpack()
    yield "its environment", pod.install()
    if pod.bucket:
        yield "the bucket", pod.mount()
    if doctor:
        yield "is all well?", pod.doctor()
    yield "run", pod.start()
    yield "follow the log", pod.follow()
    yield "how did it end?", pod.status()
    if out is not None:
        yield "fetch the results", pod.fetch(out)
    if not keep:
        yield "give it back", pod.delete()
