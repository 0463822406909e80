"""TPU chips that another process holds: how JAX says so, how to find it, and how to end it."""

import re
import shlex

# Of JAX's messages; also taken by grep -E. Each chip serves one process at a time.
MESSAGE = r"/dev/(accel|vfio/)[0-9]+\): Device or resource busy|TPU is already in use by process"
DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # what a process that holds a chip has open
WHO = "sudo lsof -w /dev/accel* /dev/vfio/*"
GRACE = 30  # seconds in which a process that is asked to end may save


def advice(error: BaseException) -> str | None:
    """Return what to do about an error of JAX, or None if it is of another kind."""
    if not isinstance(error, RuntimeError) or not re.search(MESSAGE, str(error)):
        return None
    return (
        f"another process holds the TPU chips of this machine: end it ({WHO} names it), and run "
        f"this again. JAX said: {str(error).strip().splitlines()[0]}"
    )


_FUNCTIONS = """
holders() {
  find /proc/[0-9]*/fd -maxdepth 1 \\( @DEVICES@ \\) 2> /dev/null | cut -d/ -f3 | sort -u
}
left_over() {
  for p in $(holders); do
    case "$(readlink /proc/$p/cwd)/" in
      "$FOLDER/"* | "$FOLDER (deleted)/") echo $p ;;
    esac
  done
}
"""
_FREE = """
left=$(left_over)
if test -n "$left"; then
  echo "$(hostname): ending process" $left "of an earlier command, which holds the chips"
  kill $left
  for i in $(seq $GRACE); do test -z "$(left_over)" && break; sleep 1; done
  kill -9 $(left_over)
fi 2> /dev/null
true
"""
_TELL = """
if grep -qsE "$MESSAGE" $LOG; then
  echo "$(hostname): Device or resource busy"
  for p in $(holders); do echo "  held by process $p: $(tr '\\0' ' ' < /proc/$p/cmdline)"; done
fi
"""


def free(folder: str) -> str:
    """Return a script of sh that ends what holds chips and runs in a folder of the home.

    No other process is touched: the folder is that of the code, which is about to be replaced.
    """
    return _script(_FREE, folder)


def tell(folder: str, log: str) -> str:
    """Return a script of sh that prints who holds the chips, if a log in the home says they are."""
    return _script(_TELL, folder, LOG=log)


def _script(text: str, folder: str, **variables: str) -> str:
    variables |= {"MESSAGE": MESSAGE, "GRACE": str(GRACE)}
    lines = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    devices = " -o ".join(f"-lname {shlex.quote(pattern)}" for pattern in DEVICES)
    functions = _FUNCTIONS.replace("@DEVICES@", devices)
    return "\n".join([*lines, f'FOLDER="$(cd && pwd -P)"/{folder}', functions + text])
