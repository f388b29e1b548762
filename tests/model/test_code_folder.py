"""The folder of compiled code: whose it may be, and what is said if it is another one's."""

import grp
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from h2mv_dist.errors import ConfigError
from h2mv_dist.model import code_folder as kept
from h2mv_dist.model.code_folder import VARIABLE, code_folder, no_folder_because
from h2mv_dist.model.days import no_compiler_because

AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
SOMEBODY = 54321


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch shall keep its code; not there yet."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "site" / "code"))
    return tmp_path / "site" / "code"


def test_it_is_torchs_own_choice() -> None:
    """In a process where nobody has chosen one yet."""
    ours_and_torchs = (
        "from h2mv_dist.model.code_folder import code_folder; ours = code_folder().parent\n"
        "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(ours, cache_dir())"
    )
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, "-c", ours_and_torchs]
    ours, torchs = subprocess.check_output(command, env=environment, text=True).split()
    assert ours == torchs


def test_it_is_made_for_this_user_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        assert code_folder() == folder / "h2mv_dist"
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_where_all_may_write_nothing_is_kept(folder: Path) -> None:
    code_folder().mkdir()
    for at in (folder, folder / "h2mv_dist"):
        before = stat.S_IMODE(at.stat().st_mode)
        at.chmod(0o777)
        assert f"others may write to {at} (drwxrwxrwx)" in no_folder_because()
        assert VARIABLE in no_compiler_because()
        with pytest.raises(ConfigError, match=r"others may write(.|\n)*to do: .*TORCHINDUCTOR_CACHE_DIR"):
            code_folder()
        at.chmod(before)
    assert no_folder_because() == ""


def test_a_group_of_the_users_own_may_write(folder: Path) -> None:
    """As it may by umask 002, where users have such groups."""
    others = [group.gr_gid for group in grp.getgrall() if not kept._is_private(group.gr_gid)]
    mine = others if os.getuid() == 0 else [group for group in os.getgroups() if group in others]
    own = [group.gr_gid for group in grp.getgrall() if kept._is_private(group.gr_gid)]
    if not own or not mine:
        pytest.skip("this user is not in two such groups")
    code_folder()
    folder.chmod(0o775)
    os.chown(folder, -1, own[0])
    assert no_folder_because() == ""
    os.chown(folder, -1, mine[0])
    assert "others may write" in no_folder_because()


def test_what_cannot_be_made_is_said(folder: Path) -> None:
    folder.parent.write_text("no folder")
    assert no_folder_because().startswith(f"{folder} cannot be used: Not a directory; set {VARIABLE}")


@AS_ROOT
def test_somebody_elses_folder_is_left_alone(folder: Path) -> None:
    code_folder()
    os.chown(folder, SOMEBODY, -1)
    assert f"{folder} belongs to user {SOMEBODY}" in no_folder_because()


@AS_ROOT
def test_somebody_elses_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    """He could have it lead elsewhere once it was looked at."""
    code_folder()
    own = folder.rename(tmp_path / "own")
    folder.symlink_to(own)
    assert no_folder_because() == ""
    os.chown(folder, SOMEBODY, -1, follow_symlinks=False)
    assert f"{folder} belongs to user {SOMEBODY}" in no_folder_because()
