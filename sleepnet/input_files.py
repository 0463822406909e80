"""Files that a person names, looked at before they are opened."""

import errno
import os
import pathlib
import stat

_KINDS = {
    stat.S_IFDIR: "it is a folder",
    stat.S_IFIFO: "it is a pipe",
    stat.S_IFSOCK: "it is a socket",
    stat.S_IFCHR: "it is a device",
    stat.S_IFBLK: "it is a device",
}


def regular_status(path: str | os.PathLike) -> os.stat_result:
    """Return the status of a regular file, through links.

    Opening anything else fails late or waits for ever, as a pipe does that nobody writes to.

    Raises:
      OSError: there is no such file, or something that is not a regular file.
    """
    try:
        status = pathlib.Path(path).stat()
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error)) from None
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "it is no regular file")
        raise OSError(errno.EINVAL, kind)
    return status
