"""A launch that cannot work is told so within a minute, by name, with what to do about it."""

import contextlib
import dataclasses
import json
import os
import re
import resource
import socket
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import waiting
from hands import Hands

from launch.common import chips
from launch.doctor import clusters, fit, folder, roll_call, software, supervise
from launch.doctor.clusters import Cluster
from launch.doctor.findings import OK, WRONG, within
from launch.doctor.roll_call import Card, Host, RollCallError, attend
from sleepnet import tasks
from sleepnet.config import ConfigError, MeshConfig, ModelConfig, TrainingConfig
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import DepoConfig
from sleepnet.training import sharding
from sleepnet.training.step import init_train_state, make_train_step, state_shapes


def card(process, processes=2, **changes):
    changes = {"facts": {"jax": "0.10.2"}} | changes
    return Card(process=process, processes=processes, host=f"host{process}", pid=process, **changes)


def told(findings, check):
    """What is said of one check; that it is wrong, what is seen, and the advice."""
    [finding] = [finding for finding in findings if finding.check == check]
    return finding


def small(**mesh):
    return ExperimentConfig(
        model=ModelConfig(vocab_size=64, pattern="AG", d_model=16, num_heads=2, window=8, passes=2),
        task=DepoConfig(window=8),
        training=TrainingConfig(batch_size=8),
        mesh=MeshConfig(**mesh),
    )


# Software.


def test_a_version_that_does_not_fit_is_named():
    """Of what is required, of what an extra requires and is there; not of foreign extras."""
    requires = [
        "jaxlib<=0.10.2,>=0.10.1", "ml_dtypes>=0.5", "libtpu==0.0.42.*; extra == 'tpu'",
        "jaxlib==0.10.1; extra == 'ci'", "requests; extra == 'tpu'",
    ]  # fmt: skip
    there = {"jaxlib": "0.9.0", "libtpu": "0.0.41"}
    assert list(software.mismatches("jax", requires, there.get)) == [
        "jaxlib is 0.9.0, and jax needs <=0.10.2,>=0.10.1",
        "ml_dtypes is not installed, and jax needs it",
        "libtpu is 0.0.41, and jax needs ==0.0.42.*",
    ]
    there = {"jaxlib": "0.10.2", "ml_dtypes": "0.5.1", "libtpu": "0.0.42.3"}
    assert not list(software.mismatches("jax", requires, there.get))


def test_this_environment_fits():
    [finding] = software.check()
    assert finding.status == OK and f"jax {jax.__version__}" in finding.seen


# The roll call: real sockets.


def call(port, processes, present, sees=None):
    """The roll that each of `present` gets, all in threads of this process; when they are here,
    time is up for others."""
    address, rolls, hands = f"127.0.0.1:{port}", {}, Hands()
    with Host(address, processes, waiting.PATIENCE, hands) as host:

        def come(own):
            rolls[own.process] = attend(address, own, waiting.PATIENCE, lambda token: sees)

        threads = [threading.Thread(target=come, args=(own,), daemon=True) for own in present]
        for thread in threads:
            thread.start()
        waiting.until(lambda: len(host._cards) == len(present), "the cards of all")
        hands.seconds = waiting.PATIENCE
        waiting.join(*threads)
    assert {token for token, _ in rolls.values()} == {host.token}
    return {process: roll for process, (_, roll) in rolls.items()}


def test_all_processes_get_the_whole_roll(port):
    rolls = call(port, 3, [card(i, 3) for i in range(3)], sees=True)
    for roll in rolls.values():
        assert [other.process for other in roll] == [0, 1, 2]
        assert {finding.status for finding in roll_call.findings(roll, 3)} == {OK}


def test_missing_processes_are_named_to_those_who_came(port):
    rolls = call(port, 4, [card(0, 4), card(2, 4)])
    for roll in rolls.values():
        finding = told(roll_call.findings(roll, 4), "processes")
        assert finding.status == WRONG
        assert finding.seen.startswith("2 of 4 have not joined: process 1, 3; joined: process 0")
        assert "start process 1, 3" in finding.advice


def test_the_port_is_free_again_after_the_roll_call(port):
    """JAX's coordinator takes it over."""
    address = f"127.0.0.1:{port}"
    for _ in range(2):
        with Host(address, 1, waiting.PATIENCE):
            attend(address, card(0, 1), waiting.PATIENCE, lambda token: None)


@pytest.mark.parametrize(
    ("roll", "check", "expected"),
    [
        ([card(0), card(1, clock=-37.0)], "clocks",
         "that of process 1 (host1, pid 1) is 37 s behind process 0"),
        ([card(0), card(0)], "processes", "--process_id=0 is given more than once"),
        ([card(0), card(1, 3)], "processes", "process 1 (host1, pid 1) has --num_processes=3"),
        ([card(0), card(1, facts={"jax": "0.9"})], "alike",
         "process 1 (host1, pid 1) has jax 0.9, and process 0 (host0, pid 0) has 0.10.2"),
        ([card(0, sees=True), card(1, sees=False)], "shared", "process 1 (host1, pid 1): does not"),
    ],
    ids=["clock", "twice", "count", "version", "not shared"],
)  # fmt: skip
def test_who_does_not_belong_is_named(roll, check, expected):
    finding = told(roll_call.findings(roll, 2), check)
    assert finding.status == WRONG and expected in finding.seen and finding.advice


def test_a_clock_is_not_blamed_for_a_machine_that_is_busy():
    """What may be the time that the answer took is not told as a clock that is off."""
    slow = [card(0), card(1, clock=-37.0, doubt=33.0)]
    assert told(roll_call.findings(slow, 2), "clocks").seen == "within 70.000 s of process 0"
    slow[1] = dataclasses.replace(slow[1], doubt=31.0)
    assert told(roll_call.findings(slow, 2), "clocks").status == WRONG


def test_who_answers_in_the_coordinators_place_is_told(port):
    """Nobody, a stranger, a name that does not exist, a port that is taken."""
    with pytest.raises(RollCallError, match="refuses connections: nothing listens"):
        attend(f"127.0.0.1:{port}", card(1), 0.5, lambda token: None)
    with pytest.raises(RollCallError, match=r"the name 'no-such-host\.invalid' .* is not known"):
        attend("no-such-host.invalid:80", card(1), 0.5, lambda token: None)
    with socket.create_server(("", port), family=socket.AF_INET) as stranger:

        def answer():
            connection, _ = stranger.accept()
            connection.sendall(b"SSH-2.0\n")
            connection.close()

        answering = threading.Thread(target=answer, daemon=True)
        answering.start()
        with pytest.raises(RollCallError, match="answered by a program that is no doctor"):
            attend(f"127.0.0.1:{port}", card(1), waiting.PATIENCE, lambda token: None)
        waiting.join(answering)
        with pytest.raises(RollCallError, match=f"cannot listen on port {port}"):
            Host(f"127.0.0.1:{port}", 2, 1.0).__enter__()


# A cluster that JAX finds by itself.


@pytest.fixture
def slurm(monkeypatch):
    """Task 2 of 4 on two machines, as srun tells it."""
    for name, value in {
        "SLURM_JOB_ID": "7", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "node[003-004]", "JAX_COORDINATOR_PORT": "8476",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


def test_whom_jax_finds_is_known_before_it_joins(slurm, monkeypatch):
    assert clusters.detect(1.0) == Cluster("node003:8476", num_processes=4, process_id=2)
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert clusters.detect(1.0) is None


def test_a_jax_that_does_not_tell_is_left_to_join_by_itself(slurm, monkeypatch):
    """Its inside, of which no promise is made, has moved or takes other arguments."""
    from jax._src.clusters import ClusterEnv

    with monkeypatch.context() as moved:
        moved.setitem(sys.modules, "jax._src.clusters", None)
        assert clusters.detect(1.0) is None
    monkeypatch.setattr(ClusterEnv, "auto_detect_unset_distributed_params", lambda: None)
    assert clusters.detect(1.0) is None


# The workdir.


@contextlib.contextmanager
def mounted(path, options):
    """A small file system; needs root, and a machine that lets it mount."""
    path.mkdir()
    done = waiting.run("mount", "-t", "tmpfs", "-o", options, "tmpfs", path)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        assert waiting.run("umount", path).returncode == 0


def test_a_good_workdir_is_left_as_it_was(tmp_path):
    (tmp_path / "kept").write_text("as it was")
    [finding] = folder.check(str(tmp_path))
    assert finding.status == OK
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_workdir_that_cannot_be_written_is_named_with_its_remedy(tmp_path):
    """A file, a read-only mount, a full disk."""
    (tmp_path / "file").write_text("")
    [file] = folder.check(str(tmp_path / "file"))
    assert "is a file" in file.advice
    with mounted(tmp_path / "ro", "ro,size=1m") as path:
        [finding] = folder.check(str(path))
        assert finding.status == WRONG and f"cannot write to {path}: Read-only" in finding.seen
        assert "mount it writable" in finding.advice
    with mounted(tmp_path / "full", "size=64k") as path:
        [finding] = folder.check(str(path))
        assert finding.status == WRONG and "No space left on device" in finding.seen
        assert "the disk is full" in finding.advice
        assert not list(path.iterdir())


def test_too_little_room_for_checkpoints_is_told_before_training(tmp_path):
    """Free space, and a limit of this process on the size of files."""
    [finding] = folder.check_room(str(tmp_path / "not" / "yet"), 1 << 60, kept=3)
    assert finding.status == WRONG and "3 checkpoints and one in the making" in finding.seen
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, limits[1]))
    try:
        [finding] = folder.check_room(str(tmp_path), 1 << 20, kept=1)
        [writing] = folder.check(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "files may grow to 64 kB" in finding.seen and "ulimit" in finding.advice
    assert "File too large" in writing.seen and "ulimit" in writing.advice


# Mesh and memory.


def test_a_mesh_that_does_not_fit_is_answered_with_the_nearest():
    [finding] = fit.check_mesh(small(fsdp=3), 8)
    assert finding.status == WRONG and finding.advice == "take 2"
    [finding] = fit.check_mesh(small(fsdp=2), 8)
    assert finding.status == OK and finding.seen.startswith("data 4 x fsdp 2 over 8 devices")


def test_state_bytes_are_those_that_devices_hold():
    """Against the arrays themselves, laid over 8 devices."""
    config = small(fsdp=8)
    mesh = sharding.make_mesh(config, jax.devices())
    like = state_shapes(config, None)
    state = jax.tree.map(
        lambda leaf, place: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), place),
        like, sharding.of_state(mesh, like),
    )  # fmt: skip
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert fit.num_bytes(fit.state_on_device(config, 8)) == held


def test_too_little_memory_is_told_with_ways_to_need_less():
    need = fit.Memory(state=100, gradients=50, gathered=0, activations=850)
    [tight] = fit.judge_memory(small(), need, 999)
    assert tight.status == WRONG and "model.remat=window+pass" in tight.advice
    [enough] = fit.judge_memory(small(), need, 1000)
    assert enough.status == OK and "that is near" in enough.seen


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "window", "pass", "block", "window+pass"])
def test_the_memory_estimate_is_near_what_xla_takes(remat):
    """Within UNCERTAIN of the compiled step's buffers, on one CPU device."""
    config = small()
    model = dataclasses.replace(config.model, d_model=64, passes=4, remat=remat)
    config = dataclasses.replace(config, model=model)
    task = tasks.make(config.task)
    step = make_train_step(
        model, config.training, task.window_passes(model.passes), task.scored_per_window
    )
    batch = jax.tree.map(lambda x: np.stack([x] * 8), task.example("train", 0))
    like = jax.eval_shape(lambda: init_train_state(model, config.training))
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        took = step.lower(like, batch).compile().memory_analysis()
    taken = took.temp_size_in_bytes + took.argument_size_in_bytes
    assert taken / fit.UNCERTAIN < fit.memory(config, 1).total < taken * fit.UNCERTAIN


@pytest.mark.parametrize(
    ("name", "expected"),
    [("v5e:4x4", ("v5e", 16)), ("v5p:2x2x2", ("v5p", 8)), ("v6e:16x16", ("v6e", 256))],
)
def test_a_topology_is_a_kind_and_a_number_of_chips(name, expected):
    assert chips.parse_topology(name) == expected


@pytest.mark.parametrize("name", ["v5x:4x4", "v5e:4x4x4", "v5p:4x4", "v5e", "v5e:0x4", "v5e:99x99"])
def test_a_topology_that_is_none_is_answered_with_one(name):
    with pytest.raises(ConfigError, match=r"v5e|v5p:4x4x4"):
        chips.parse_topology(name)


# Nothing hangs.


def test_a_check_that_hangs_is_left_behind():
    mount_is_back = threading.Event()
    [finding] = within(0.2, "workdir", mount_is_back.wait, "see its mount")
    assert finding.status == WRONG and finding.seen == "hangs: no answer within 0 s"
    mount_is_back.set()


SAY = """
import json, os, sys, time
print("a library's word")
def begin(seconds):
    print(json.dumps({"stage": "devices", "seconds": seconds, "doing": "asking"}), flush=True)
"""


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (f"begin(0.3); time.sleep({waiting.TOO_LONG})", "asking: no answer in time"),
        (f"begin({waiting.TOO_LONG}); print('F1124 x.h:80] DEADLINE', file=sys.stderr); os.abort()",
         "asking: ended with code -6: DEADLINE"),
        (f"begin({waiting.TOO_LONG}); raise ValueError('no TPU')",
         "asking: ended with code 1: ValueError: no TPU"),
    ],
    ids=["hangs", "aborts", "raises"],
)  # fmt: skip
def test_a_child_that_hangs_or_dies_is_a_finding_of_its_stage(script, expected):
    child = [sys.executable, "-c", SAY + script]
    [finding] = supervise.watch(child, seconds=waiting.PATIENCE)
    assert (finding.check, finding.status) == ("devices", WRONG)
    assert expected in finding.seen and "another program may hold the devices" in finding.advice


# The program itself, in real processes.


def doctor(*arguments, path=None, slurm=None, program="doctor"):
    """`python -m launch.doctor` as it is started by a person, on a machine that may be slow.

    Args: path of modules to be found first; slurm: (port, process, processes), as srun tells.
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    if slurm is not None:
        told = zip(("JAX_COORDINATOR_PORT", "SLURM_PROCID", "SLURM_NTASKS"), slurm, strict=True)
        environment |= {name: str(value) for name, value in told}
        environment |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}
        environment |= {"SLURM_JOB_ID": "7"}
    patient = [f"--seconds={waiting.PATIENCE}", "--json"] if program == "doctor" else []
    return waiting.Program(
        sys.executable, "-m", f"launch.{program}", "--config=experiments/depo_small.py",
        "--config.model.d_model=16", "--config.model.passes=2", *arguments, *patient,
        env=environment,
    )  # fmt: skip


def findings(started):
    """Exit code and findings of a doctor."""
    done = started.end()
    assert not done.stderr, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, {finding["check"]: finding for finding in found}


def cluster(port, processes, process):
    return (
        f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}",
        f"--process_id={process}",
    )  # fmt: skip


# Seconds for others to come: of those who all come, and where one is missing.
PATIENT, BRIEF = "--wait=600", "--wait=10"


def test_a_healthy_launch_is_well(tmp_path):
    """Every line is ok, exit code 0; a topology stands in for devices that are not here."""
    code, found = findings(doctor(f"--workdir={tmp_path}", "--topology=v5e:4x4"))
    assert code == 0 and {finding["status"] for finding in found.values()} <= {"ok", "skipped"}
    assert "over 16 devices" in found["mesh"]["seen"]
    assert "of 16 GB a device" in found["memory"]["seen"]


@pytest.mark.slow
def test_two_processes_that_can_train_together_are_well(tmp_path, port):
    both = [doctor(f"--workdir={tmp_path}", PATIENT, *cluster(port, 2, i)) for i in range(2)]
    for process in both:
        code, found = findings(process)
        assert code == 0, found
        assert found["processes"]["seen"] == "all 2 have joined, on 1 machine(s)"
        assert found["exchange"]["status"] == found["shared"]["status"] == "ok"
        assert "over 4 devices" in found["mesh"]["seen"]


@pytest.mark.slow
def test_a_dead_coordinator_is_named(tmp_path, port):
    code, found = findings(doctor(f"--workdir={tmp_path}", BRIEF, *cluster(port, 2, 1)))
    assert code == 1
    assert f"127.0.0.1:{port} refuses connections" in found["coordinator"]["seen"]
    assert "process 0 (--process_id=0) on 127.0.0.1" in found["coordinator"]["advice"]


@pytest.mark.slow
def test_one_missing_worker_is_named(tmp_path, port):
    """To both that came; and what they can see alone is still judged."""
    there = [doctor(f"--workdir={tmp_path}", BRIEF, *cluster(port, 3, i)) for i in (0, 2)]
    for process in there:
        code, found = findings(process)
        assert code == 1
        assert "1 of 3 have not joined: process 1;" in found["processes"]["seen"]
        assert found["disk"]["status"] == "ok"
        assert "3 x 1 x 1" in found["mesh"]["seen"] or "6 x 1 x 1" in found["mesh"]["seen"]


def shifted_clock(tmp_path):
    """A path that makes Python live 40 s behind."""
    shifted = tmp_path / "shifted"
    shifted.mkdir()
    (shifted / "sitecustomize.py").write_text(
        "import time\nhere = time.time\ntime.time = lambda: here() - 40\n"
    )
    return shifted


def seconds_behind(finding):
    """How far a clock is said to be behind; on a busy machine not to the second."""
    (seconds,) = re.findall(r"is (\d+) s behind process 0", finding["seen"])
    return int(seconds)


@pytest.mark.slow
def test_a_clock_that_is_off_is_named(tmp_path, port):
    """Process 1 lives 40 s behind: the only thing that is wrong."""
    shifted = shifted_clock(tmp_path)
    workdir = tmp_path / "run"
    right = doctor(f"--workdir={workdir}", PATIENT, *cluster(port, 2, 0))
    late = doctor(f"--workdir={workdir}", PATIENT, *cluster(port, 2, 1), path=shifted)
    for process in (right, late):
        code, found = findings(process)
        assert code == 1
        assert [check for check in found if found[check]["status"] == "wrong"] == ["clocks"]
        assert "that of process 1 (" in found["clocks"]["seen"]
        assert 30 < seconds_behind(found["clocks"]) < 50


@pytest.mark.slow
def test_processes_that_jax_finds_by_itself_are_judged_too(tmp_path, port):
    """Two tasks of Slurm, one with a clock that is off: told by the roll call, before they join."""
    shifted = shifted_clock(tmp_path)
    flags = (f"--workdir={tmp_path / 'run'}", "--distributed", PATIENT)
    right = doctor(*flags, slurm=(port, 0, 2))
    late = doctor(*flags, slurm=(port, 1, 2), path=shifted)
    for process in (right, late):
        code, found = findings(process)
        assert code == 1
        assert [check for check in found if found[check]["status"] == "wrong"] == ["clocks"]
        assert 30 < seconds_behind(found["clocks"]) < 50
        assert found["shared"]["status"] == "ok"
        assert "over 4 devices" in found["mesh"]["seen"]


@pytest.mark.slow
def test_where_jax_finds_no_cluster_it_is_told(tmp_path):
    code, found = findings(doctor(f"--workdir={tmp_path}", "--distributed"))
    assert code == 1 and found["join"]["status"] == "wrong" and found["join"]["advice"]
    assert "JAX finds no cluster here by itself" in found["join"]["seen"]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["doctor", "train"])
def test_a_missing_task_of_slurm_is_named(tmp_path, port, program):
    """By the doctor, and by training, which JAX would abort without a name."""
    flags = (f"--workdir={tmp_path}", "--distributed", "--wait=3")
    started = doctor(*flags, slurm=(port, 0, 2), program=program)
    if program == "doctor":
        code, found = findings(started)
        seen = found["processes"]["seen"]
    else:
        done = started.end()
        code, seen = done.returncode, done.stderr
    assert code == (1 if program == "doctor" else 2)
    assert "1 of 2 have not joined: process 1; joined: process 0 (" in seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [("ro", "Read-only file system"), ("size=64k", "No space left on device")],
    ids=["read-only", "full"],
)
def test_a_workdir_that_takes_no_checkpoint_is_named(tmp_path, options, expected):
    with mounted(tmp_path / "disk", options) as path:
        code, found = findings(doctor(f"--workdir={path}"))
    assert code == 1
    assert expected in found["workdir"]["seen"] and found["workdir"]["advice"]
    assert [check for check in found if found[check]["status"] == "wrong"] == ["workdir"]


@pytest.mark.slow
def test_a_worker_without_the_shared_workdir_is_named(tmp_path, port):
    both = [
        doctor(f"--workdir={tmp_path / str(i)}", PATIENT, *cluster(port, 2, i)) for i in range(2)
    ]
    for process in both:
        code, found = findings(process)
        assert code == 1
        assert "process 1 (" in found["shared"]["seen"]
