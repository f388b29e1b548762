"""The folder that keeps compiled code, from which processes of this user load, and so run, what they find.

By default it has a name that anybody can guess, in a folder where everybody may make it first.
"""

import getpass
import grp
import os
import pwd
import re
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Final

from h2mv_dist.errors import ConfigError, describe

VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch, and we beside it, keep what is compiled."""
PRIVATE: Final = 0o700
_NOT_IN_NAMES: Final = re.compile(r'[\\/:*?"<>|]')
INSTEAD: Final = f"set {VARIABLE} to another folder of your own"


def code_folder() -> Path:
    """Where this machine keeps what we compile, beside what torch compiles; it may have to be made.

    Raises:
        ConfigError: who is not this user may have put code there.
    """
    if problem := no_folder_because():
        raise ConfigError(
            describe(
                "there is no folder that compiled code can be loaded from",
                where=VARIABLE,
                expected="a folder of this user's, where nobody else can write",
                actual=problem,
                fix=INSTEAD,
            )
        )
    return _folders()[-1]


def no_folder_because() -> str:
    """Why what is compiled cannot be kept and found again safely; empty if it can.

    torch's folder is made if it is not there: torch would make it as the umask has it.
    """
    try:
        _folders()[0].mkdir(PRIVATE, parents=True, exist_ok=True)
        problems = [_foreign_because(folder) for folder in _folders() if os.path.lexists(folder)]
    except OSError as error:
        return f"{_folders()[0]} cannot be used: {error.strerror}; {INSTEAD}"
    return next(filter(None, problems), "")


def keeps_headers() -> bool:
    """Whether torch can compile headers once and keep them, safely.

    It does that where it usually keeps code, whatever ``VARIABLE`` says, and with a command of the system.
    """
    folder = Path(_usual_folder())
    try:
        folder.mkdir(PRIVATE, parents=True, exist_ok=True)
        return not _foreign_because(folder) and shutil.which("openssl") is not None
    except OSError:
        return False


def _folders() -> tuple[Path, Path]:
    """Torch's, and ours in it."""
    folder = Path(os.path.abspath(os.environ.get(VARIABLE, _usual_folder())))
    return folder, folder / "h2mv_dist"


def _usual_folder() -> str:
    """Torch's own choice; to ask torch for it takes an import of seconds."""
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):
        user = f"uid_{os.getuid()}"
    return str(Path(tempfile.gettempdir()) / f"torchinductor_{_NOT_IN_NAMES.sub('_', user)}")


def _foreign_because(folder: Path) -> str:
    # a link is another one's, too, who may have it lead elsewhere a moment later
    link, found = folder.lstat(), folder.stat()
    strangers = {link.st_uid, found.st_uid} - {os.getuid()}
    if strangers:
        return f"{folder} belongs to {_name_of(strangers.pop())}, whose code would be run; {INSTEAD}"
    if found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid)):
        mode = stat.filemode(found.st_mode)
        return f"others may write to {folder} ({mode}), and have their code run; remove it, or {INSTEAD}"
    return ""


def _is_private(group: int) -> bool:
    """Whether it is a group of this user's alone, of his name.

    Where users have one, folders are made group-writable (umask 002, by ``login`` and ``pam_umask``, which
    go by the name, too). To be the user's first group is not enough: at a site it may be everybody's.
    """
    try:
        user, known = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return known.gr_name == user and set(known.gr_mem) <= {user}


def _name_of(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
