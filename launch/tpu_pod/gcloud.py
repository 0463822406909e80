"""Runs commands, and says what a failure of gcloud asks of its user."""

import dataclasses
import shlex
import subprocess

# What stands in gcloud's error, and what to do.
REMEDIES = {
    "not a git repository": "run this in a clone of the repository",
    "PERMISSION_DENIED": "ask for the role TPU Admin (roles/tpu.admin) in this project, or "
    "`gcloud auth login` as somebody who has it",
    "Reauthentication": "`gcloud auth login`",
    "You do not currently have an active account": "`gcloud auth login`",
    "SERVICE_DISABLED": "`gcloud services enable tpu.googleapis.com`",
    "uota": "ask for more (console: IAM & Admin, Quotas, TPU), or take a smaller --accelerator, "
    "another --zone, or --tier=spot, which has a quota of its own",
    "RESOURCE_EXHAUSTED": "take another --zone, or wait and run this again",
    "eservation": "check the reservation of this zone, or take --tier=spot or --tier=on-demand",
    "gcsfuse: command not found": "install gcsfuse on the machines' image, or leave --bucket out "
    "(cloud.google.com/storage/docs/cloud-storage-fuse/install)",
    "accelerator type": "see `gcloud compute tpus accelerator-types list --zone=ZONE`",
    "runtime version": "see `gcloud compute tpus versions list --zone=ZONE`, and --runtime_version",
    "ALREADY_EXISTS": "it is being deleted or belongs to another request: wait, or take another "
    "--name",
}


class PodError(RuntimeError):
    """A command failed; the message names it, what it said and what to do."""


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    output: str
    errors: str


def ask(command: list[str]) -> Result:
    """Runs a command and keeps what it says."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:
        raise PodError(_not_installed(command)) from None
    return Result(done.returncode, done.stdout.strip(), done.stderr.strip())


def do(command: list[str]) -> str:
    """Runs a command that must succeed; what it says."""
    result = ask(command)
    if result.code:
        raise PodError(explain(command, result))
    return result.output


def show(command: list[str]) -> int:
    """Runs a command whose words go to the terminal as they come; its exit code."""
    try:
        return subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        raise PodError(_not_installed(command)) from None


def explain(command: list[str], result: Result) -> str:
    said = result.errors or result.output or "it said nothing"
    remedy = next((remedy for part, remedy in REMEDIES.items() if part in said), None)
    line = f"{_what(command)} failed with code {result.code}: {said[-500:]}"
    return line + (f"\nwhat to do: {remedy}" if remedy else "")


def text(command: list[str]) -> str:
    """As it can be pasted into a shell."""
    return shlex.join(command)


def _what(command):
    words = [word for word in command[:6] if not word.startswith("-")]
    return " ".join(words)


def _not_installed(command):
    return f"{command[0]} is not installed: see cloud.google.com/sdk/docs/install"
