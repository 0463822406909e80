"""The workdir: can it be written, read, renamed; is it shared; is there room for checkpoints?"""

import contextlib
import errno
import os
import pathlib
import resource
import secrets
import shutil

from launch.doctor.findings import Finding, ok, wrong

PROBE = ".doctor-"
PROBE_BYTES = 1 << 20
REMEDIES = {
    errno.EROFS: "it is mounted read-only: mount it writable, or name another --workdir",
    errno.EACCES: "you have no permission: change its owner or mode, or name another --workdir",
    errno.EPERM: "you have no permission: change its owner or mode, or name another --workdir",
    errno.ENOSPC: "the disk is full (or out of inodes): free some, or name another --workdir",
    errno.EDQUOT: "your quota is used up: free some, or name another --workdir",
    errno.EFBIG: "files may not grow: raise the limit (ulimit -f unlimited)",
    errno.ENOTDIR: "something on this path is a file: name another --workdir",
    errno.EEXIST: "it is a file, not a folder: name another --workdir",
}


def check(workdir: str) -> list[Finding]:
    """Makes the folder; writes, reads back, renames and deletes a file in it."""
    folder = pathlib.Path(workdir).absolute()
    doing = "make"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        doing = "write to"
        content = secrets.token_bytes(PROBE_BYTES)
        path = folder / f"{PROBE}{secrets.token_hex(4)}"
        try:
            _write(path, content)
            doing = "read from"
            damaged = path.read_bytes() != content
            doing = "rename a file in"
            renamed = path.with_name(path.name + "-renamed")
            os.replace(path, renamed)
            doing = "delete a file in"
            renamed.unlink()
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "name another --workdir")
        return [wrong("workdir", f"cannot {doing} {folder}: {error.strerror}", remedy)]
    if damaged:
        return [wrong("workdir", f"{folder} gives back other bytes than were written",
                      "do not train on it: the disk or its mount is broken")]  # fmt: skip
    return [ok("workdir", f"{folder}: written, read, renamed")]


def _write(path: pathlib.Path, content: bytes):
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def check_room(workdir: str, state_bytes: int, kept: int) -> list[Finding]:
    """Room for all checkpoints that are kept and one that is being written."""
    folder = pathlib.Path(workdir).absolute()
    while not folder.exists():
        folder = folder.parent
    needed = (kept + 1) * state_bytes
    free = shutil.disk_usage(folder).free
    line = (
        f"{size(free)} free in {folder}, and {kept} checkpoints and one in the making "
        f"take {size(needed)}"
    )
    if free < needed:
        return [wrong("disk", line, "free some, lower training.checkpoints_kept, or name another "
                                    "--workdir")]  # fmt: skip
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and limit < state_bytes:
        seen = f"files may grow to {size(limit)}, and a checkpoint has {size(state_bytes)}"
        return [wrong("disk", seen, REMEDIES[errno.EFBIG])]
    return [ok("disk", line)]


@contextlib.contextmanager
def marked(workdir: str, name: str):
    """A file, while the block runs, by which other processes know that they see this folder."""
    path = pathlib.Path(workdir) / f"{PROBE}{name}"
    path.write_bytes(b"")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def sees_mark(workdir: str, name: str) -> bool:
    """Whether another process's `marked` is seen here."""
    return (pathlib.Path(workdir) / f"{PROBE}{name}").exists()


def size(num_bytes: float) -> str:
    """3.2 GB, 15 MB: decimal, as data sheets of chips and disks count."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
