"""The states of Cloud TPU, and what each asks of a program that wants the machines.

Names and meanings as in cloud.google.com/tpu/docs/reference/rest/v2: `QueuedResourceState.State`
for requests, `Node.State` for machines.
"""

from launch.tpu_pod.gcloud import PodError

# What to do.
ASK, WAIT, USE, REPLACE = "ask for it", "wait", "use it", "delete what is left, and ask anew"
NOT_FOUND = "NOT_FOUND"  # what gcloud says in place of a state
UNSPECIFIED = "STATE_UNSPECIFIED"

REQUESTS = {
    UNSPECIFIED: WAIT,
    "CREATING": WAIT,
    "ACCEPTED": WAIT,
    "WAITING_FOR_RESOURCES": WAIT,
    "PROVISIONING": WAIT,
    "ACTIVE": USE,
    "SUSPENDING": WAIT,  # until SUSPENDED
    "SUSPENDED": REPLACE,
    "DELETING": WAIT,  # until there is none
    "FAILED": REPLACE,
    NOT_FOUND: ASK,
}
MACHINES = {
    UNSPECIFIED: WAIT,
    "CREATING": WAIT,
    "STARTING": WAIT,
    "RESTARTING": WAIT,
    "REIMAGING": WAIT,
    "UNHIDING": WAIT,
    "READY": USE,
    "REPAIRING": REPLACE,  # for hours, and what ran there is gone
    "UNKNOWN": REPLACE,  # a repair has failed
    "PREEMPTED": REPLACE,
    "TERMINATED": REPLACE,
    "STOPPING": REPLACE,
    "STOPPED": REPLACE,
    "HIDING": REPLACE,
    "HIDDEN": REPLACE,
    "DELETING": REPLACE,
    NOT_FOUND: REPLACE,
}
CHANGING = ("REPAIRING", "STOPPING", "HIDING", "DELETING")  # machines that may refuse to be deleted


def step(table: dict[str, str], name: str, state: str) -> str:
    """Return what to do about a state.

    Raises:
      PodError: it is not in the table.
    """
    if state not in table:
        raise PodError(f"{name} is in a state that we do not know: {state}")
    return table[state]
