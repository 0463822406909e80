"""Where compiled programs are kept, so that later starts need not compile them again."""

import os
import pathlib

from sleepnet import storage
from sleepnet.config import ConfigError
from sleepnet.config.checks import local_path
from sleepnet.storage import StorageError

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def use(given: pathlib.Path | None) -> str:
    """Set the folder of compiled programs for all that this process compiles.

    Args:
      given: by --compilation_cache; "none" for no folder. None: the folder that the environment
        names, or sleepnet's in the user's cache folder. A home that is unknown or cannot be written
        is no reason not to train: nothing is kept then.

    Returns:
      A line that tells where they are kept, or why they are not.

    Raises:
      StorageError: the folder was given and cannot be written.
    """
    import jax

    folder, why = None, ""
    try:
        folder = _default() if given is None else _writable(given)
    except (ConfigError, StorageError) as error:
        if given is not None:
            raise StorageError(f"--compilation_cache={given}: {error}") from None
        why = f": {str(error).split(';')[0]}; --compilation_cache=FOLDER names another place"
    jax.config.update("jax_compilation_cache_dir", folder)
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    if folder is not None and enabled:
        return f"compiled programs are kept in {folder}"
    return f"compiled programs are not kept for the next start{why}"


def _default() -> str | None:
    named = os.environ.get(VARIABLE)
    if named and "://" in named:  # JAX itself reads and writes what only it needs
        return named
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _writable(local_path(named or f"{home}/sleepnet"))


def _writable(folder: str | os.PathLike) -> str | None:
    if str(folder) == "none":
        return None
    storage.prepare_folder(pathlib.Path(folder))
    return str(folder)
