"""Two hosts on this machine: network namespaces that a virtual cable joins. Files, processes and memory
are shared, the network is not: each has an address of its own, and the cable can be cut.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

MISSING = "no command `ip` on this machine (Debian: apt-get install iproute2)"
NETWORK = "192.0.2"  # for documentation (RFC 5737): nobody has it


@dataclass(frozen=True)
class Host:
    """A network namespace. Its end of the cable has the same name."""

    name: str
    address: str

    def command(self, *command: str) -> tuple[str, ...]:
        """The command that runs another one here."""
        return ("ip", "netns", "exec", self.name, *command)

    def link(self, state: str) -> None:
        """Its end of the cable, ``up`` or ``down``."""
        _ip("-netns", self.name, "link", "set", self.name, state)


def missing() -> str | None:
    """Why there can be no hosts here."""
    if os.geteuid() != 0:
        return "network namespaces are made by root"
    if not shutil.which("ip"):
        return MISSING
    try:
        with two_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces on this machine ({error.stderr.strip()})"


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """While open, two hosts. What runs on them ends with them."""
    names = [f"sl{letter}{os.getpid()}" for letter in "ab"]  # an interface's name has 15 letters at most
    hosts = Host(names[0], f"{NETWORK}.1"), Host(names[1], f"{NETWORK}.2")
    made = []
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            made.append(host)
        first, second = hosts
        _ip("-netns", first.name, "link", "add", first.name, "type", "veth",
            "peer", "name", second.name, "netns", second.name)  # fmt: skip
        for host in hosts:
            _ip("-netns", host.name, "address", "add", f"{host.address}/24", "dev", host.name)
            _ip("-netns", host.name, "link", "set", "lo", "up")
            host.link("up")
        yield hosts
    finally:
        for host in made:  # the cable goes with them
            for number in _ip("netns", "pids", host.name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(number), signal.SIGKILL)
            _ip("netns", "delete", host.name)


def _ip(*arguments: str) -> str:
    return subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True).stdout
