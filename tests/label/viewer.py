"""A label server in a child process, and a client that logs each HTTP request with its status and time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
from requests_toolbelt.multipart import decoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["ACCOUNT", "PASSWORD", "CheckError", "Checks", "Viewer", "free_port", "running", "server"]

ACCOUNT, PASSWORD = "checker", "correct horse battery staple"
_PATIENCE = 180.0


class CheckError(Exception):
    """A check failed."""


class Checks:
    """Log of a run on standard output: HTTP requests and checks."""

    def __init__(self) -> None:
        self.steps = 0
        self.found = 0

    def say(self, text: str) -> None:
        """Write one line."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def step(self, method: str, path: str, status: int, seconds: float, note: str = "") -> None:
        """Log one HTTP request."""
        self.steps += 1
        self.say(f"{self.steps:3d}  {method:6s} {path:78.78s} {status} {seconds:7.2f} s  {note}")

    def hold(self, fact: bool, text: str) -> None:
        """Log a check that passed.

        Raises:
            CheckError: The check failed.
        """
        if not fact:
            raise CheckError(text)
        self.found += 1
        self.say(f"     ok: {text}")


class Viewer:
    """HTTP client that behaves like 3D Slicer.

    Args:
        checks: Log of the requests.
        address: Address of the server.
    """

    def __init__(self, checks: Checks, address: str) -> None:
        self.checks = checks
        self.address = address
        self.headers: dict[str, str] = {}

    def call(self, method: str, path: str, *, expect: int | Sequence[int] = 200, note: str = "", **options: Any) -> Any:
        """Send a request and return the response.

        Raises:
            CheckError: Unexpected status.
        """
        start = time.perf_counter()
        response = requests.request(
            method, self.address + path, headers=self.headers | options.pop("headers", {}), timeout=600, **options
        )
        self.checks.step(method, path, response.status_code, time.perf_counter() - start, note)
        expected = (expect,) if isinstance(expect, int) else tuple(expect)
        if response.status_code not in expected:
            raise CheckError(f"{method} {path}: {response.status_code}, expected {expected}: {response.text[:2000]}")
        return response

    def log_in(self) -> None:
        """Get a token, as the login window of a viewer does."""
        form = {"username": ACCOUNT, "password": PASSWORD}
        answer = self.call("POST", "/auth/token", data=form).json()
        self.headers = {"Authorization": f"Bearer {answer['access_token']}"}

    def infer(self, model: str, image: str, target: Path, **params: Any) -> tuple[Path, dict[str, Any]]:
        """Request a mask and return its file, below `target`, and the parameters of the response."""
        form = {"params": json.dumps({"device": "cpu", **params})}
        response = self.call("POST", f"/infer/{model}?image={image}", data=form)
        parts = {}
        for part in decoder.MultipartDecoder.from_response(response).parts:
            head = part.headers[b"Content-Disposition"].decode()
            name = head.split('name="')[1].split('"')[0]
            parts[name] = (head.split('filename="')[1].split('"')[0] if "filename=" in head else "", part.content)
        target.mkdir(parents=True, exist_ok=True)
        name, content = parts["image"]
        (target / name).write_bytes(content)
        return target / name, json.loads(parts["params"][1])

    def save_label(self, image: str, label: Path, names: Mapping[str, int]) -> None:
        """Save a corrected label, with the names of its values."""
        info = [{"name": name, "idx": value} for name, value in names.items()]
        form = {"params": json.dumps({"label_info": info})}
        with label.open("rb") as file:
            self.call("PUT", f"/datastore/label?image={image}", data=form, files={"label": (label.name, file)})

    def wait(self, path: str, *, seconds: float) -> tuple[str, float]:
        """Poll a job until it ends; return its status ("DONE", "ERROR", "STOPPED") and duration in seconds."""
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            status = self.call("GET", path).json()["status"]
            if status not in ("SUBMITTED", "RUNNING"):
                return status, time.perf_counter() - start
            time.sleep(5)
        raise CheckError(f"{path} is still running after {seconds} s")


@contextmanager
def server(
    checks: Checks, studies: str, state: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[Viewer, Path]]:
    """Run a label server; yield a client that is not logged in, and the file of the server's output."""
    add = [sys.executable, "-m", "medseg", "label", "add-account", ACCOUNT, "--state", str(state)]
    subprocess.run(add, input=PASSWORD + "\n", text=True, check=True, stdout=subprocess.DEVNULL)
    port = free_port()
    printed = state.with_name(f"{state.name}.printed")
    command = [sys.executable, "-m", "medseg", "label", "serve", "--studies", studies, "--state", str(state)]
    with running([*command, "--port", str(port), *arguments], printed, environment) as process:
        viewer = Viewer(checks, f"http://127.0.0.1:{port}")
        _wait(process, printed, lambda: requests.get(viewer.address + "/auth/", timeout=5).ok)
        try:
            yield viewer, printed
        except CheckError as error:
            raise CheckError(f"{error}\nThe server printed:\n{printed.read_text(errors='replace')[-4000:]}") from error
    checks.hold(process.returncode in (0, -15, 143), f"the server stopped on request ({process.returncode})")


@contextmanager
def running(
    command: Sequence[str], printed: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program while the block runs, with its output in a file."""
    with printed.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], printed: Path, ready: Callable[[], bool]) -> None:
    start = time.perf_counter()
    while time.perf_counter() - start < _PATIENCE:
        if process.poll() is not None:
            break
        try:
            if ready():
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    raise CheckError(f"the server does not answer; its output:\n{printed.read_text(errors='replace')[-3000:]}")


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
