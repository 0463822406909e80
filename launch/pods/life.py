"""A pod's life: asked for, waited for, furnished, run, followed, and given back."""

import contextlib
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator

from launch.pods import commands, gcloud
from launch.pods.commands import Pod
from launch.pods.gcloud import PodError

ON_ITS_WAY = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
GONE = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING", "NOT_FOUND")
LOST_NODE = ("PREEMPTED", "TERMINATED", "STOPPED", "NOT_FOUND")
LOST_CONNECTION = 255  # of ssh
STOPPED = (128 + 15, 128 + 2)  # a machine that is taken away sends SIGTERM first
RECONNECTIONS = 5


class Life:
    """Of one pod.

    Args:
      say: takes lines for people.
      pause: seconds between two questions for its state.
    """

    def __init__(self, pod: Pod, say: Callable[[str], None], pause: float = 15.0):
        self.pod, self._say, self._pause = pod, say, pause

    def live(self, out: pathlib.Path | None, *, keep: bool, resubmit: int, doctor: bool) -> int:
        """All of it; the exit code of the command.

        Args:
          out: a folder here for the results; None: they stay where they are.
          keep: the machines stay when the command has ended.
          resubmit: how often to ask for new machines when these are taken away.
        """
        with self._never_silent():
            code = self._furnish_and_run(doctor)
            while code is None and resubmit > 0:
                self._say(f"the machines were taken away; asking for new ones ({resubmit} left)")
                resubmit -= 1
                code = self._furnish_and_run(doctor)
            if code is None:
                self._say("the machines were taken away: the same command goes on from the last "
                          "checkpoint; --resubmit=10 does so by itself")  # fmt: skip
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
        result = gcloud.ask(self.pod.describe())
        if result.code and "NOT_FOUND" in result.errors:
            return "NOT_FOUND"
        if result.code:
            raise PodError(gcloud.explain(self.pod.describe(), result))
        return result.output or "CREATING"

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
        """The exit code of the command, or None if the machines were taken away."""
        self._obtain()
        if gcloud.ask(self.pod.running()).code == 0:
            self._say("the command already runs there; following it")
        else:
            try:
                self._furnish(doctor)
                gcloud.do(self.pod.start())
            except PodError:
                if self._taken_away():
                    return None
                raise
        return self._follow()

    def _obtain(self):
        """Waits until the machines are there, asking for them where nobody has."""
        last, asked = "", False
        while (state := self.state()) != "ACTIVE":
            if state in GONE:
                if asked and state == "FAILED":
                    raise PodError(f"{self.pod.name} was refused (state FAILED): see "
                                   f"{gcloud.text(self.pod.describe()[:-1])}")  # fmt: skip
                if state != "NOT_FOUND":
                    self._say(f"{self.pod.name} is {state}: deleting what is left of it")
                    gcloud.do(self.pod.delete())
                self._say(f"asking for {self.pod.accelerator.name} in {self.pod.zone}")
                gcloud.do(self.pod.create())
                asked = True
            elif state not in ON_ITS_WAY:
                raise PodError(f"{self.pod.name} is in a state that we do not know: {state}")
            elif state != last:
                self._say(f"{self.pod.name}: {state}")
            last = state
            time.sleep(self._pause)
        if self._node_state() in LOST_NODE:
            self._say(f"the machines of {self.pod.name} are gone: deleting what is left of it")
            gcloud.do(self.pod.delete())
            self._obtain()

    def _furnish(self, doctor: bool):
        """The code, its environment and the bucket, on every machine."""
        with tempfile.TemporaryDirectory() as folder:
            archive = pathlib.Path(folder) / f"{commands.CODE}.tar.gz"
            gcloud.do(commands.archive(archive))
            self._say("copying the last commit to all machines")
            gcloud.do(self.pod.copy(archive))
        gcloud.do(self.pod.unpack())
        self._say("installing")
        gcloud.do(self.pod.install())
        if self.pod.bucket:
            gcloud.do(self.pod.mount())
        if doctor and gcloud.show(self.pod.doctor()):
            raise PodError("the doctor found something wrong (above); --nodoctor goes on anyway")

    def _follow(self) -> int | None:
        for _ in range(RECONNECTIONS):
            code = gcloud.show(self.pod.follow())
            if code == 0:
                return 0
            if self._taken_away(patient=code in STOPPED):
                return None
            if code != LOST_CONNECTION:
                return code
            self._say("the connection was lost; following again")
        raise PodError("the connection to the machines was lost again and again; the command may "
                       "run on there: the same command follows it")  # fmt: skip

    def _taken_away(self, patient: bool = False) -> bool:
        """Whether the machines are gone; a stopped command's may take a while to be."""
        for _ in range(4 if patient else 1):
            if self.state() in GONE or self._node_state() in LOST_NODE:
                return True
            if patient:
                time.sleep(self._pause)
        return False

    def _node_state(self) -> str:
        result = gcloud.ask(self.pod.node())
        return result.output if result.code == 0 else "NOT_FOUND"

    def _fetch(self, out: pathlib.Path):
        out.mkdir(parents=True, exist_ok=True)
        self._say(f"fetching the results into {out}")
        gcloud.do(self.pod.fetch(out))


def plan(pod: Pod, out: pathlib.Path | None, *, keep: bool, doctor: bool):
    """The commands of a life in which nothing goes wrong, each with what it is for."""
    archive = pathlib.Path(f"{commands.CODE}.tar.gz")
    yield "is it there?", pod.describe()
    yield "if not, ask for it", pod.create()
    yield "until ACTIVE", pod.describe()
    yield "are its machines there?", pod.node()
    yield "does the command run already?", pod.running()
    yield "if not: the code", commands.archive(archive)
    yield "to all machines", pod.copy(archive)
    yield "unpacked", pod.unpack()
    yield "its environment", pod.install()
    if pod.bucket:
        yield "the bucket", pod.mount()
    if doctor:
        yield "is all well?", pod.doctor()
    yield "run", pod.start()
    yield "follow the log", pod.follow()
    if out is not None:
        yield "fetch the results", pod.fetch(out)
    if not keep:
        yield "give it back", pod.delete()
