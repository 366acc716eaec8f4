"""Two hosts on one machine: network namespaces with a cable between them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import uuid
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "net0"


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


def why_not() -> str | None:
    """Why there can be no such hosts here; None where there can."""
    if shutil.which("ip") is None:
        return "ip not installed (Debian: iproute2)"
    try:
        with TwoHosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces: {error.stderr.strip()}"


class TwoHosts:
    """As a context it lays the cable, and at the end ends all that runs there.

    Attributes:
        names: of the two network namespaces.
    """

    def __init__(self) -> None:
        stem = uuid.uuid4().hex[:8]
        self.names = (f"host-{stem}-a", f"host-{stem}-b")
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> TwoHosts:
        """Makes both hosts."""
        try:
            for name in self.names:
                _ip("netns", "add", name)
            _ip("link", "add", DEVICE, "netns", self.names[0], "type", "veth", "peer", DEVICE, "netns", self.names[1])
            for name, address in zip(self.names, ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
                _ip("-n", name, "link", "set", DEVICE, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends processes and takes the hosts away."""
        for host in range(2):
            self.kill(host)
        for process in self._started:
            process.wait()
        for name in self.names:
            _ip("netns", "delete", name, check=False)

    def start(self, host: int, command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Starts a command on a host; its output is added to ``log``."""
        with open(log, "ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command], env=environment, stdout=output, stderr=output
            )
        self._started.append(process)
        return process

    def cut(self) -> None:
        """Pulls the cable: packets are lost, and nobody is told."""
        _ip("-n", self.names[0], "link", "set", DEVICE, "down")

    def mend(self) -> None:
        """Plugs it in again."""
        _ip("-n", self.names[0], "link", "set", DEVICE, "up")

    def kill(self, host: int) -> None:
        """Ends all processes of a host at once."""
        for process in _ip("netns", "pids", self.names[host], check=False).stdout.split():
            try:
                os.kill(int(process), signal.SIGKILL)
            except ProcessLookupError:
                continue
