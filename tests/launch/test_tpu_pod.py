"""A pod is asked for, used and given back by the commands that --dry_run prints, whatever gcloud
answers; nothing that costs is left behind without a word.

`gcloud` is a program on PATH that writes down its arguments and plays a script. What it is told to
run on machines, it runs here, each in a home of its own: the shell scripts are real.
"""

import json
import os
import pathlib
import shlex
import signal
import sys

import pytest
import waiting

from launch.common import busy, cli
from launch.common.chips import RUNTIMES, parse_accelerator, parse_topology
from launch.tpu_pod import gcloud
from launch.tpu_pod.commands import Pod
from launch.tpu_pod.gcloud import PodError
from launch.tpu_pod.life import Life, cause, plan
from sleepnet.config import ConfigError

GCLOUD = """
import json, os, pathlib, subprocess, sys
here, arguments = pathlib.Path(__file__).parent, sys.argv[1:]
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps(arguments) + chr(10))
verb = " ".join(arguments[:4] if arguments[0] == "compute" else arguments[:2])
verb = verb.removeprefix("compute tpus ")
script = json.loads((here / "script.json").read_text())
[command] = [a.partition("=")[2] for a in arguments if a.startswith("--command=")] or [""]
for key, answers in script.items():
    if (key == verb or key in command) and answers:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        (here / "script.json").write_text(json.dumps(script))
        print(answer.get("out", ""), end="")
        print(answer.get("err", ""), end="", file=sys.stderr)
        sys.exit(answer.get("code", 0))
machines = [here / "machine0", here / "machine1"]
if verb == "tpu-vm ssh":
    if "uv venv" in command or "launch.doctor" in command or "gcsfuse" in command:
        sys.exit(0)
    for machine in machines if "--worker=all" in arguments else machines[:1]:
        machine.mkdir(exist_ok=True)
        environment = os.environ | {"HOME": str(machine)}
        code = subprocess.run(["bash", "-c", command], cwd=machine, env=environment).returncode
    sys.exit(code)
if verb == "tpu-vm scp" and "--worker=all" in arguments:
    for machine in machines:
        machine.mkdir(exist_ok=True)
        (machine / "sleepnet.tar.gz").write_bytes(pathlib.Path(arguments[4]).read_bytes())
"""
NOT_FOUND = {"code": 1, "err": "ERROR: (gcloud...) NOT_FOUND: Requested entity was not found."}
ACTIVE, READY = {"out": "ACTIVE\n"}, {"out": "READY\n"}
DESCRIBE, NODE = "queued-resources describe", "tpu-vm describe"
STATUS, FOLLOW = "echo running", "tail -n +1"  # in what machines are told to run
RUNNING, FREE, DONE = {"out": "running\n"}, {"out": "free\n"}, {"out": "ended 0\n"}
LOST = {"code": 255, "err": "ssh: connect to host port 22: Connection refused"}


class Cloud:
    """The folder of the fake gcloud."""

    def __init__(self, folder):
        self.folder = folder
        program = folder / "gcloud"
        program.write_text(f"#!{sys.executable} -S\n{GCLOUD}")
        program.chmod(0o755)

    def plays(self, **script):
        """Answers by verb, or by what stands in a machine's command; the last one stays."""
        (self.folder / "script.json").write_text(json.dumps(script.pop("script", {}) | script))

    def calls(self):
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self):
        return [call[3] if call[0] == "compute" else call[1] for call in self.calls()]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """And a clone with one commit, to be copied."""
    (tmp_path / "cloud").mkdir()
    (tmp_path / "clone").mkdir()
    monkeypatch.chdir(tmp_path / "clone")
    pathlib.Path("train.sh").write_text("echo trained in $PWD; exit ${CODE:-0}\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        assert waiting.run(*git, *arguments, cwd=tmp_path / "clone").returncode == 0
    monkeypatch.setenv("PATH", f"{tmp_path / 'cloud'}{os.pathsep}{os.environ['PATH']}")
    return Cloud(tmp_path / "cloud")


def pod(*command, bucket=None, accelerator="v5litepod-16", tier="on-demand"):
    accelerator = parse_accelerator(accelerator)
    return Pod(
        name="depo", accelerator=accelerator, zone="us-west4-a", project="mine",
        runtime=RUNTIMES[accelerator.kind], tier=tier, bucket=bucket,
        command=command or ("sh", "train.sh", "--workdir=/mnt/b/depo"),
    )  # fmt: skip


def live(pod, *, out=None, keep=False, resubmit=0, said=None):
    said = [] if said is None else said
    code = Life(pod, said.append, pause=0.0).live(out, keep=keep, resubmit=resubmit, doctor=True)
    return code, said


# What Cloud TPU offers.


@pytest.mark.parametrize(
    ("name", "topology", "chips", "hosts"),
    [
        ("v5litepod-1", "v5e:1x1", 1, 1), ("v5litepod-8", "v5e:2x4", 8, 1),
        ("v5litepod-16", "v5e:4x4", 16, 4), ("v5litepod-256", "v5e:16x16", 256, 64),
        ("v6e-16", "v6e:4x4", 16, 4), ("v5p-8", "v5p:2x2x1", 4, 1),
        ("v5p-16", "v5p:2x2x2", 8, 2), ("v5p-128", "v5p:4x4x4", 64, 16),
        ("v4-32", "v4:2x2x4", 16, 4),
    ],
)  # fmt: skip
def test_a_type_is_chips_and_machines_in_a_topology(name, topology, chips, hosts):
    accelerator = parse_accelerator(name)
    assert (accelerator.topology, accelerator.chips, accelerator.hosts) == (topology, chips, hosts)
    assert parse_topology(topology) == (accelerator.kind, chips)


def test_a_type_that_is_not_offered_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"v5litepod-8, .*; the nearest is 'v5litepod-16'"):
        parse_accelerator("v5litepod-17")


# A life.


def test_a_life_runs_exactly_the_planned_commands(cloud, tmp_path):
    """From nothing to results, on two machines, in the order of the plan."""
    mine = pod(bucket="b", tier="spot")
    waiting = [NOT_FOUND, {"out": "WAITING_FOR_RESOURCES"}, {"out": "PROVISIONING"}, ACTIVE]
    cloud.plays(script={DESCRIBE: waiting, NODE: [READY]})
    code, said = live(mine, out=tmp_path / "out")
    assert code == 0
    planned = [command for _, command in plan(mine, tmp_path / "out", keep=False, doctor=True)]
    asked = [["gcloud", *call] for call in cloud.calls()]
    archives = [i for i, command in enumerate(asked) if "scp" in command]
    asked[archives[0]][5] = "sleepnet.tar.gz"  # it lay in a temporary folder
    distinct = [command for i, command in enumerate(asked) if command not in asked[:i]]
    expected = [command for command in planned if command[0] == "gcloud"]
    assert distinct == [command for i, command in enumerate(expected)
                        if command not in expected[:i]]  # fmt: skip
    assert "--spot" in planned[1] and planned[-1][4] == "delete"
    for machine in ("machine0", "machine1"):
        home = cloud.folder / machine
        assert (home / "sleepnet.log").read_text() == f"trained in {home}/sleepnet\n"
        assert (home / "sleepnet.exit").read_text() == "0\n"
    assert ["depo: WAITING_FOR_RESOURCES", "depo: PROVISIONING"] == [
        line for line in said if line.startswith("depo: ")
    ]


def test_machines_that_are_there_are_used_and_kept_if_asked(cloud):
    cloud.plays(script={DESCRIBE: [ACTIVE], NODE: [READY], FOLLOW: [{}], STATUS: [FREE, DONE]})
    code, said = live(pod(), keep=True)
    assert code == 0
    assert "create" not in cloud.verbs() and "delete" not in cloud.verbs()
    assert (
        "is kept, and costs; to delete it: gcloud compute tpus queued-resources delete depo"
        in (said[-1])
    )


def test_the_exit_code_is_that_of_the_command(cloud, monkeypatch, capfd):
    """Its last words are shown, and the machines are given back."""
    monkeypatch.setenv("CODE", "7")
    cloud.plays(script={DESCRIBE: [ACTIVE], NODE: [READY]})
    assert live(pod())[0] == 7
    assert "exit code 7" in capfd.readouterr().out
    assert cloud.verbs()[-1] == "delete"


def test_a_preempted_run_is_asked_for_again_and_goes_on(cloud):
    """While it ran; deleted, created anew, furnished anew, run with the same command."""
    suspended = {"out": "SUSPENDED"}
    script = {
        DESCRIBE: [ACTIVE, suspended, {"out": "SUSPENDING"}, suspended, NOT_FOUND,
                   {"out": "PROVISIONING"}, ACTIVE],
        NODE: [READY], FOLLOW: [LOST, {}], STATUS: [FREE, LOST, FREE, DONE],
    }  # fmt: skip
    cloud.plays(script=script)
    code, said = live(pod(bucket="b"), resubmit=1)
    assert code == 0
    assert any("running it again (1 left)" in line for line in said)
    verbs = cloud.verbs()
    assert verbs.count("create") == 1 and verbs.count("delete") == 2
    assert verbs.index("delete") < verbs.index("create")
    starts = [call for call in cloud.calls() if "nohup" in " ".join(call)]
    assert len(starts) == 2 and starts[0] == starts[1]


def test_a_node_may_be_preempted_while_its_request_is_active(cloud):
    """Stopped by SIGTERM, and without --resubmit: told how to go on, given back, exit code 1."""
    cloud.plays(script={
        DESCRIBE: [ACTIVE], NODE: [READY, READY, {"out": "PREEMPTED"}], FOLLOW: [{}],
        STATUS: [FREE, {"out": "ended 143"}],
    })  # fmt: skip
    code, said = live(pod(bucket="b"))
    assert code == 1 and cloud.verbs()[-1] == "delete"
    assert any("goes on from the last checkpoint; --resubmit" in line for line in said)


def test_a_lost_connection_is_no_lost_run(cloud):
    """Nor is a question that goes unanswered: nothing is deleted, nothing started twice."""
    offline = {"code": 1, "err": "ERROR: Unable to find the server at tpu.googleapis.com"}
    cloud.plays(script={
        DESCRIBE: [ACTIVE, offline, ACTIVE], NODE: [READY, offline, READY],
        FOLLOW: [LOST, LOST, {}],
        STATUS: [LOST, FREE, LOST, RUNNING, RUNNING, DONE],
    })  # fmt: skip
    code, said = live(pod())
    assert code == 0 and said.count("the connection was lost; following again") == 2
    assert sum("nohup" in " ".join(call) for call in cloud.calls()) == 1
    assert cloud.verbs().count("delete") == 1 and cloud.verbs()[-1] == "delete"


def test_a_run_that_is_alive_is_followed_not_started_again(cloud):
    """And its code is not replaced under it."""
    cloud.plays(script={DESCRIBE: [ACTIVE], NODE: [READY], FOLLOW: [{}], STATUS: [RUNNING, DONE]})
    code, said = live(pod())
    assert code == 0 and "already runs there" in said[0]
    assert not [call for call in cloud.calls() if "scp" in call or "nohup" in " ".join(call)]


@pytest.mark.parametrize("end", ["free", "ended 75"], ids=["restarted machine", "stalled run"])
def test_a_run_that_was_cut_short_is_run_again(cloud, end):
    """On the same machines: with no exit code, as after a restart, or with that for a stall."""
    cloud.plays(script={DESCRIBE: [ACTIVE], NODE: [READY], FOLLOW: [{}],
                        STATUS: [FREE, {"out": end}, {"out": end}, FREE, DONE]})  # fmt: skip
    code, _ = live(pod(bucket="b"), resubmit=1)
    assert code == 0 and sum("nohup" in " ".join(call) for call in cloud.calls()) == 2


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((134, 134, 134), None), ((143, 134, 134), None),
        ((134, 75, 134), None), ((75, 1), None), ((1, 75), None),
        ((134, 1, 134), 1), ((134, 2), 2), ((75, 2), 2), ((1, 1), 1), ((7, 0), 7),
        ((143, 143), 143),
    ],
    ids=str,
)  # fmt: skip
def test_an_error_of_ones_own_is_told_from_what_it_does_to_others(codes, expected):
    """JAX aborts (134) where another process ends, whatever ended it; 75 asks to be tried again,
    and whoever waits for that process may fail; 2 is explained by its message."""
    assert cause(codes) == expected


@pytest.mark.parametrize(("ends", "code"), [("134 75", 0), ("134 1", 1)])
def test_all_machines_are_asked_how_the_command_ended(cloud, ends, code):
    """Of which process 0 may know nothing: it was aborted. Others may take their time to end."""
    all_of = [{"out": f"ended {end}\n"} for end in ends.split()]
    some, every = "ended 134\nrunning\n", "".join(answer["out"] for answer in all_of)
    again = [] if code else [FREE, DONE]
    cloud.plays(script={
        DESCRIBE: [ACTIVE], NODE: [READY], FOLLOW: [{}],
        STATUS: [FREE, all_of[0], {"out": some}, {"out": every}, *again],
    })  # fmt: skip
    ended, said = live(pod(bucket="b"), resubmit=1)
    assert ended == code
    assert any("running it again" in line for line in said) == (code == 0)
    assert sum("nohup" in " ".join(call) for call in cloud.calls()) == (2 if code == 0 else 1)


def test_a_machine_that_is_lost_is_no_error_of_the_others(cloud):
    """They fail with a traceback when they wait for it."""
    lost = {"out": "ended 1\n", "code": 1, "err": "ssh: connect to host port 22: timed out"}
    cloud.plays(script={
        DESCRIBE: [ACTIVE], NODE: [READY, READY, {"out": "PREEMPTED"}], FOLLOW: [{}],
        STATUS: [FREE, {"out": "ended 1"}, lost],
    })  # fmt: skip
    code, said = live(pod(bucket="b"))
    assert code == 1 and any("it was cut short" in line for line in said)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("ERROR: PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "roles/tpu.admin"),
        ("ERROR: Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZone' has been exceeded",
         "another --zone, or --tier=spot"),
        ("ERROR: There is no more capacity in the zone: RESOURCE_EXHAUSTED", "another --zone"),
        ("ERROR: invalid accelerator type", "accelerator-types list"),
    ],
    ids=["permission", "quota", "capacity", "type"],
)  # fmt: skip
def test_a_refusal_is_told_with_what_to_do(cloud, error, remedy):
    cloud.plays(script={DESCRIBE: [NOT_FOUND], "queued-resources create": [
        {"code": 1, "err": error}]})  # fmt: skip
    said = []
    with pytest.raises(PodError) as raised:
        live(pod(), said=said)
    assert error in str(raised.value) and remedy in str(raised.value).split("what to do:")[1]
    assert "gcloud compute tpus queued-resources create depo failed with code 1" in str(
        raised.value
    )
    assert "may still run, and cost" in said[-1] and "queued-resources delete depo" in said[-1]


def test_a_request_that_fails_is_not_made_for_ever(cloud):
    cloud.plays(script={DESCRIBE: [NOT_FOUND, {"out": "FAILED"}]})
    with pytest.raises(PodError, match="was refused"):
        live(pod())
    assert cloud.verbs().count("create") == 1


def test_without_gcloud_one_is_told_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PodError, match="gcloud is not installed: see"):
        live(pod())


def test_printed_commands_can_be_pasted_into_a_shell():
    for _, command in plan(pod(bucket="b"), pathlib.Path("out"), keep=False, doctor=True):
        assert shlex.split(gcloud.text(command)) == command


def test_a_workdir_without_a_bucket_is_fetched_from_the_first_machine():
    fetch = pod("python", "-m", "x", "--workdir", "runs/depo").fetch(pathlib.Path("out"))
    assert fetch[5:7] == ["depo:sleepnet/runs/depo", "out"] and "--worker=0" in fetch


def test_the_doctor_there_is_asked_about_the_command_in_both_spellings_of_its_flags():
    for command in (["x", "--workdir=a", "--config=b", "--config.model.passes=2", "--distributed"],
                    ["x", "--workdir", "a", "--config", "b", "--config.model.passes", "2",
                     "--distributed", "--stop_at", "5"]):  # fmt: skip
        script = pod(*command).doctor()[7]
        assert script.endswith(
            "python -m launch.doctor --workdir=a --config=b --config.model.passes=2 --distributed"
        )
        assert pod(*command).workdir == "a"


# Every state of Cloud TPU.

USED = "used"
WAITED = "waited for"
REPLACED = "deleted, and asked for anew"
ASKED = "asked for"
MACHINES = {
    "STATE_UNSPECIFIED": WAITED, "CREATING": WAITED, "READY": USED, "RESTARTING": WAITED,
    "REIMAGING": WAITED, "DELETING": REPLACED, "REPAIRING": REPLACED, "STOPPED": REPLACED,
    "STOPPING": REPLACED, "STARTING": WAITED, "PREEMPTED": REPLACED, "TERMINATED": REPLACED,
    "HIDING": REPLACED, "HIDDEN": REPLACED, "UNHIDING": WAITED, "UNKNOWN": REPLACED,
    "NOT_FOUND": REPLACED,
}  # fmt: skip
# And what becomes of a request by itself.
REQUESTS = {
    "STATE_UNSPECIFIED": (WAITED, "ACTIVE"), "CREATING": (WAITED, "ACTIVE"),
    "ACCEPTED": (WAITED, "ACTIVE"), "PROVISIONING": (WAITED, "ACTIVE"),
    "WAITING_FOR_RESOURCES": (WAITED, "ACTIVE"), "ACTIVE": (USED, "ACTIVE"),
    "SUSPENDING": (REPLACED, "SUSPENDED"), "SUSPENDED": (REPLACED, "SUSPENDED"),
    "FAILED": (REPLACED, "FAILED"), "DELETING": (ASKED, "NOT_FOUND"),
    "NOT_FOUND": (ASKED, "NOT_FOUND"),
}  # fmt: skip


class Simulated:
    """A request and its machines, and a command that ends well but for what `event` does to it.

    event: called when the command is followed for the first time; after it, machines that are not
    READY do not answer, and those that are have lost what ran on them.
    """

    def __init__(self, monkeypatch, *, request="ACTIVE", then="ACTIVE", machines="READY"):
        self.request, self.then, self.machines = request, then, machines
        self.status, self.did, self.event, self.refusals = "free", [], None, 0
        for name in ("ask", "show", "do"):
            monkeypatch.setattr(gcloud, name, getattr(self, name))

    def ask(self, command):
        answer = self._answer(pod(), command)
        return answer if isinstance(answer, gcloud.Result) else gcloud.Result(0, answer or "", "")

    def do(self, command):
        result = self.ask(command)
        if result.code:
            raise PodError(result.errors)
        return result.output

    def show(self, command):
        return self.ask(command).code

    def _answer(self, pod, command):
        if command == pod.describe():
            seen, self.request = self.request, self.then
            return self._found(seen)
        if command == pod.node():
            seen = self.machines
            if MACHINES[seen] == WAITED:
                self.machines = "READY"  # by the next time
            return self._found(seen)
        if command == pod.create():
            self.did.append("create")
            self.request = self.then = "ACTIVE"
            self.machines, self.status = "READY", "free"
        elif command == pod.delete():
            if self.refusals:
                self.refusals -= 1
                return gcloud.Result(1, "", "FAILED_PRECONDITION: it is changing")
            self.did.append("delete")
            self.request = self.then = "NOT_FOUND"
        elif command == pod.start():
            self.did.append("start")
            self.status = "running"
        elif command == pod.follow():
            event, self.event = self.event, None
            (event or self._end)()
        elif command in (pod.status(), pod.status("all")):
            return self.status if self.machines == "READY" else gcloud.Result(255, "", "refused")

    def _found(self, state):
        missing = gcloud.Result(1, "", "NOT_FOUND: no such entity")
        return missing if state == "NOT_FOUND" else state

    def _end(self):
        self.status = "ended 0"


@pytest.mark.parametrize("state", MACHINES)
def test_machines_that_are_lost_are_replaced_whatever_that_is_called(monkeypatch, state):
    """After READY, while the command runs: it is run again, on those machines or on others."""
    cloud = Simulated(monkeypatch)

    def lose():
        cloud.machines = state
        if MACHINES[state] == WAITED:
            cloud.status = "free"  # they restart

    cloud.event = lose
    assert live(pod(), resubmit=1)[0] == 0
    expected = {
        USED: ["start"],
        WAITED: ["start", "start"],
        REPLACED: ["start", "delete", "create", "start"],
    }[MACHINES[state]]
    assert cloud.did == [*expected, "delete"]


@pytest.mark.parametrize("state", MACHINES)
def test_machines_are_taken_in_any_state_by_the_same_command(monkeypatch, state):
    """As it is given again some day, to go on."""
    cloud = Simulated(monkeypatch, machines=state)
    assert live(pod())[0] == 0
    again = ["delete", "create"] if MACHINES[state] == REPLACED else []
    assert cloud.did == [*again, "start", "delete"]


@pytest.mark.parametrize("state", REQUESTS)
def test_a_request_is_taken_in_any_state(monkeypatch, state):
    done, then = REQUESTS[state]
    cloud = Simulated(monkeypatch, request=state, then=then)
    assert live(pod())[0] == 0
    before = {REPLACED: ["delete", "create"], ASKED: ["create"]}.get(done, [])
    assert cloud.did == [*before, "start", "delete"]


@pytest.mark.parametrize("state", sorted(REQUESTS.keys() - {"ACTIVE", "STATE_UNSPECIFIED"}))
def test_a_request_that_is_no_longer_active_has_lost_its_machines(monkeypatch, state):
    cloud = Simulated(monkeypatch)

    def lose():
        cloud.request, cloud.then = state, REQUESTS[state][1]
        cloud.machines, cloud.status = "NOT_FOUND" if cloud.then != "ACTIVE" else "READY", "free"

    cloud.event = lose
    assert live(pod(), resubmit=1)[0] == 0
    again = {REPLACED: ["delete", "create"], ASKED: ["create"]}.get(REQUESTS[state][0], [])
    assert cloud.did == ["start", *again, "start", "delete"]


def test_a_state_that_is_not_known_is_told_and_nothing_is_deleted(monkeypatch):
    cloud = Simulated(monkeypatch, request="FROZEN", then="FROZEN")
    with pytest.raises(PodError, match="depo is in a state that we do not know: FROZEN"):
        live(pod())
    assert cloud.did == []


@pytest.mark.parametrize(("refusals", "replaced"), [(3, True), (99, False)])
def test_machines_that_are_changing_may_refuse_to_be_deleted_for_a_while(
    monkeypatch, refusals, replaced
):
    cloud = Simulated(monkeypatch, machines="DELETING")
    cloud.refusals = refusals
    if replaced:
        assert live(pod())[0] == 0 and cloud.did == ["delete", "create", "start", "delete"]
    else:
        with pytest.raises(PodError, match="FAILED_PRECONDITION"):
            live(pod())


# Chips that another process holds.


def test_chips_that_are_held_are_told_of_and_tried_again(monkeypatch):
    """Once, of its own accord: what is left over has been ended before; exit code of the second."""
    cloud = Simulated(monkeypatch)
    freed, answer = [], cloud._answer

    def held(mine, command):
        if command == mine.who_holds_chips():
            return "host1: Device or resource busy\n  held by process 7: python x.py"
        if command == mine.free_chips():
            freed.append(list(cloud.did))
        return answer(mine, command)

    cloud._answer = held
    cloud.event = lambda: setattr(cloud, "status", "ended 1")
    code, said = live(pod())
    assert code == 0 and cloud.did == ["start", "start", "delete"]
    assert freed == [[], ["start"]]
    [told] = [line for line in said if "holds TPU chips" in line]
    assert "held by process 7: python x.py" in told and "sudo lsof -w /dev/accel*" in told


@pytest.fixture
def chip(tmp_path, monkeypatch):
    """A file in place of a device, and processes that hold it from some folder of a home."""
    chip, home, children = tmp_path / "accel0", tmp_path / "home", []
    chip.write_text("")
    monkeypatch.setattr(busy, "DEVICES", (str(chip),))
    (home / "sleepnet" / "runs").mkdir(parents=True)

    def hold(folder):
        (home / folder).mkdir(exist_ok=True)
        with chip.open() as file:
            children.append(waiting.Program("sleep", 600, cwd=home / folder, stdin=file).process)
        return children[-1]

    yield home, hold
    for child in children:
        child.kill()
        child.wait()


def there(home, script):
    done = waiting.run("sh", "-c", script, env=os.environ | {"HOME": str(home)}, cwd=home)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_what_a_command_left_over_is_ended_and_nothing_else(chip):
    """Of the processes that hold the chips, those in the folder of the code, also where it was."""
    home, hold = chip
    ours, other = [hold("sleepnet"), hold("sleepnet/runs"), hold("old")], hold("sleepnet-venv")
    (home / "sleepnet" / "runs").rmdir()
    (home / "sleepnet").rmdir()
    (home / "sleepnet").mkdir()
    idle = waiting.Program("sleep", 600, cwd=home / "sleepnet").process
    said = there(home, busy.free("sleepnet"))
    assert all(str(child.pid) in said for child in ours[:2]) and said.count("\n") == 1
    for child in ours[:2]:
        assert child.wait(waiting.PATIENCE) == -signal.SIGTERM
    assert all(child.poll() is None for child in (ours[2], other, idle))
    assert there(home, busy.free("sleepnet")) == ""
    idle.kill()
    idle.wait()


MESSAGES = [
    "Unable to initialize backend 'tpu': UNKNOWN: TPU initialization failed: open(/dev/vfio/1): "
    "Device or resource busy: Device or resource busy; Couldn't open iommu group /dev/vfio/1 "
    "(set JAX_PLATFORMS='' to automatically choose an available backend)",
    "Unable to initialize backend 'tpu': FAILED_PRECONDITION: open(/dev/accel0): Device or "
    "resource busy: Device or resource busy; Couldn't open device: /dev/accel0",
    "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid "
    "176028. Not attempting to load libtpu.so in this process.",
]


@pytest.mark.parametrize("message", MESSAGES, ids=["vfio", "accel", "pid"])
def test_what_jax_says_of_chips_that_are_held_is_known(chip, message, capsys):
    """To a program, which asks to be tried again; and in the log of a machine."""
    home, hold = chip
    assert cli.complain_of(RuntimeError(message)) == 75
    assert "lsof -w /dev/accel* /dev/vfio/*" in capsys.readouterr().err
    assert cli.complain_of(RuntimeError("INTERNAL: it broke")) is None
    assert cli.complain_of(OSError(16, "Device or resource busy")) is None
    (home / "log").write_text(f"Traceback\nRuntimeError: {message}\n")
    holder = hold("old")
    [first, second] = there(home, busy.tell("sleepnet", "log")).splitlines()
    assert first.endswith(": Device or resource busy")
    assert second == f"  held by process {holder.pid}: sleep 600 "
    (home / "log").write_text("Traceback\nOSError: Device or resource busy: 'folder'\n")
    assert there(home, busy.tell("sleepnet", "log")) == ""


# The program.

COMMAND = ["--", "python", "-m", "launch.train", "--config=experiments/depo_small.py"]


def program(*arguments):
    return [sys.executable, "-m", "launch.tpu_pod", "--name=depo", "--zone=z", *arguments]


def environment(cloud=None):
    path = os.environ["PATH"] if cloud is None else f"{cloud.folder}{os.pathsep}/usr/bin:/bin"
    return os.environ | {"PATH": path, "PYTHONPATH": str(waiting.ROOT)}


@pytest.mark.slow
def test_a_dry_run_asks_for_nothing_and_tells_commands_and_cost(cloud):
    """And that a mesh does not fit the chips: exit code 1."""
    dry = ["--accelerator=v5litepod-16", "--bucket=b", "--hours=2", "--dry_run"]
    for batch, code in ((64, 0), (60, 1)):
        run = (*dry, *COMMAND, f"--config.training.batch_size={batch}", "--workdir=/mnt/b/d")
        done = waiting.run(*program(*run), env=environment(cloud))
        assert done.returncode == code, done.stdout + done.stderr
        assert "16 chips in 4 machine(s), 32 chip-hours" in done.stdout
        assert "queued-resources delete depo --force" in done.stdout
        assert "--distributed" in done.stdout
        assert not cloud.calls()
    assert "training.batch_size=60 must be a multiple" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--resubmit=1", *COMMAND, "--workdir=runs/x"], "give --bucket=BUCKET"),
        (["--bucket=b", *COMMAND, "--workdir=runs/x"], "the nearest is --workdir=/mnt/b/x"),
        (["--accelerator=v5p-17", *COMMAND], "the nearest is 'v5p-1"),
        ([], "give the command behind two dashes"),
    ],
    ids=["no bucket", "outside", "type", "nothing"],
)
def test_a_bad_command_is_answered_before_anything_is_asked_for(cloud, arguments, expected):
    done = waiting.run(*program(*arguments), env=environment(cloud))
    assert done.returncode == 2 and expected in done.stderr
    assert not cloud.calls()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_what_still_runs_and_how_to_delete_it(cloud, number):
    cloud.plays(script={DESCRIBE: [{"out": "WAITING_FOR_RESOURCES"}]})
    command = program("--accelerator=v5litepod-1", "--nodoctor", *COMMAND)
    run = waiting.Program(*command, env=environment(cloud))
    run.output.until("depo: WAITING_FOR_RESOURCES")
    run.send(number)
    done = run.end()
    assert done.returncode == 130, done.stderr
    assert "stopped: depo may still run, and cost" in done.stdout
    delete = "gcloud compute tpus queued-resources delete depo --force --quiet --zone=z"
    assert delete in done.stdout
    assert "Traceback" not in done.stderr
