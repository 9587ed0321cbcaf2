"""Each fallback of the sandbox alone keeps files and the network out of reach, and nothing runs without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepdistill.distill.graders.code.sandbox import FILE_LAYERS, NETWORK_LAYERS, confinement

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the layers are Linux's")

SCRIPT = """
import ctypes, json, os, socket, sys
from pathlib import Path
from deepdistill.distill.graders.code import sandbox

without, scratch, secret, port = sys.argv[1].split(","), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
try:
    layers = sandbox.confine(
        scratch, sandbox.python_paths(), parent=os.getppid(), layers=sandbox.LAYERS - set(without)
    )
except sandbox.NotConfined:
    sys.exit(9)

def connect(): socket.create_connection(("127.0.0.1", port), 2)
def datagram(): socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port))
def read(): open(secret).read()
def passwords(): open("/etc/passwd").read()
def beside(): open(scratch.parent / "beside", "w")
def write(): open(secret, "a").write("x")
def library(): open(os.__file__, "a")
def times(): os.utime(os.__file__, ns=(os.stat(os.__file__).st_atime_ns, os.stat(os.__file__).st_mtime_ns))
def memory(): bytearray(10 ** 10)
def large(): open("big", "wb").write(bytes(1 << 26))

import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
done = []
for attempt in (connect, datagram, read, passwords, beside, write, library, times, memory, large):
    try:
        attempt()
        done.append(attempt.__name__)
    except (OSError, MemoryError):
        pass
Path("mine").write_text("x")
import fractions, decimal, zlib
print(json.dumps([layers, done]))
"""


def attempt(without: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    import socket

    scratch, secret = tmp_path / "scratch", tmp_path / "secret"
    scratch.mkdir()
    secret.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", SCRIPT, without, str(scratch), str(secret), str(server.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert secret.read_text() == "secret"
    return done


@pytest.mark.parametrize(
    "without", ["", "network namespace", "mounts", "landlock", "seccomp", "mounts,seccomp", "landlock,seccomp"]
)
def test_what_is_left_still_confines(without: str, tmp_path: Path) -> None:
    done = attempt(without, tmp_path)
    if done.returncode == 9:
        pytest.skip("this system does not grant the other layers")
    assert done.returncode == 0, done.stderr
    layers, escaped = json.loads(done.stdout)
    assert not set(without.split(",")) & set(layers)
    # A file's times are not Landlock's: the mounts keep them, and seccomp does.
    assert set(escaped) <= ({"times"} if {"mounts", "seccomp"} <= set(without.split(",")) else set())


@pytest.mark.parametrize(
    "without", ["network namespace,seccomp", "mounts,landlock", "network namespace,landlock,seccomp"]
)
def test_nothing_runs_without_files_and_network_out_of_reach(without: str, tmp_path: Path) -> None:
    assert attempt(without, tmp_path).returncode == 9


def test_confinement_names_the_layers_of_this_machine() -> None:
    layers = confinement()
    assert set(layers) <= {"limits", *FILE_LAYERS, *NETWORK_LAYERS}
    assert FILE_LAYERS & set(layers)
    assert NETWORK_LAYERS & set(layers)
    assert os.getcwd() != "/", "it was tried in another process"
