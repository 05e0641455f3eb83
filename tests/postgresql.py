"""A private PostgreSQL server for a test: its own folder and socket, no port, and gone afterwards."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DRIVERS = ("psycopg", "psycopg2")
_PLACES = "/usr/lib/postgresql"  # Debian's
_PATIENCE_S = 120


def why_not() -> str | None:
    """Why no server can be started here; None if one can."""
    if _programs() is None:
        return f"no PostgreSQL: neither initdb on the path nor one below {_PLACES}"
    if _driver() is None:
        return f"no driver of PostgreSQL: none of {', '.join(DRIVERS)} is installed"
    if _user() is None:
        return "PostgreSQL does not run as root, and there is neither a user postgres nor nobody"
    return None


def _programs() -> Path | None:
    places = sorted(Path(_PLACES).glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]), reverse=True)
    on_path = shutil.which("initdb")
    found = Path(on_path) if on_path else next(iter(places), None)
    return None if found is None else found.resolve().parent


def _driver() -> str | None:
    return next((name for name in DRIVERS if importlib.util.find_spec(name) is not None), None)


def _user() -> pwd.struct_passwd | None:
    """The user that the server runs as: this one, but for root, which PostgreSQL refuses."""
    if os.getuid():
        return pwd.getpwuid(os.getuid())
    known = {each.pw_name: each for each in pwd.getpwall()}
    return known.get("postgres") or known.get("nobody")


@contextmanager
def server() -> Iterator[str]:
    """Start a server; yields the URL of its database as SQLAlchemy and Optuna read it."""
    programs, user = _programs(), _user()
    assert programs is not None
    assert user is not None
    # The path of a socket is short, and the server's user must reach it.
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    try:
        os.chown(folder, user.pw_uid, user.pw_gid)

        def call(program: str, *arguments: str) -> None:
            command = [str(programs / program), "-D", str(folder / "data"), *arguments]
            identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if not os.getuid() else {}
            done = subprocess.run(
                command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE_S,
                check=False, **identity,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr

        call("initdb", "--auth=trust", "--no-sync", "--username=sweeps", "--encoding=UTF8")
        settings = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        call("pg_ctl", "-w", "-t", str(_PATIENCE_S), "-l", str(folder / "log"), "-o", settings, "start")
        try:
            yield f"postgresql+{_driver()}://sweeps@/postgres?host={folder}"
        finally:
            call("pg_ctl", "-w", "-t", str(_PATIENCE_S), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
