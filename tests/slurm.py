"""A Slurm of two nodes on this machine, from Debian's packages: for tests that submit jobs, and by hand,
``python tests/slurm.py DIRECTORY``, which runs until it is stopped.

Everything listens on the loopback address and lies in one directory.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline_lib.core.preloaded import _ending_with

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun")
MISSING = "no Slurm on this machine (Debian: apt-get install slurmctld slurmd slurm-client munge)"
LOST = 10  # seconds without an answer after which a node counts as down
AGAIN = 10  # seconds until a job that was queued again may start (Slurm's own: 120)
CONF = """ClusterName=pair
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={home}/munge.sock,cred_expire={again}
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout={lost}
KillWait=5
MinJobAge=86400
SchedulerParameters=sched_interval=2,bf_interval=2
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=8000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP LLN=YES
"""


def missing() -> str | None:
    """Why there can be no Slurm here."""
    if os.geteuid() != 0:
        return "the node daemons of Slurm are started by root"
    found = [shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") for program in PROGRAMS]
    return None if all(found) else MISSING


@dataclass
class Slurm:
    """A running cluster. Its daemons are children of this process."""

    home: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environ(self) -> dict[str, str]:
        """What Slurm's commands need."""
        return os.environ | {
            "SLURM_CONF": str(self.home / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }

    def start(self, name: str) -> None:
        """``munged``, ``slurmctld`` or a node."""
        munge = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid"}
        munge |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        command = {
            "munged": [
                "munged",
                "--foreground",
                "--force",
                *(f"--{option}={self.home / file}" for option, file in munge.items()),
            ],
            "slurmctld": ["slurmctld", "-D"],
        }.get(name, ["slurmd", "-D", "-N", name])
        with (self.home / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command,
                env=self.environ,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_ending_with(os.getpid()),
            )

    def kill(self, name: str) -> None:
        """SIGKILL to a daemon alone: what it has started lives on."""
        self.daemons[name].kill()
        self.daemons.pop(name).wait()

    def ask(self, *command: str) -> str:
        """What a command of Slurm says; nothing while the controller is away."""
        done = subprocess.run(
            command, env=self.environ, capture_output=True, text=True, check=False, timeout=120
        )
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        told = self.ask("scontrol", "--oneliner", "show", "job", number)
        return dict(part.split("=", 1) for part in told.split() if "=" in part)

    def wait(self, reached: Callable[[], bool], seconds: float, what: str) -> None:
        """
        Raises:
            AssertionError: ``what`` is not so after so many seconds.
        """
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{self.ask('squeue', '-a')}"
            time.sleep(0.2)


@contextmanager
def two_nodes(home: Path) -> Iterator[Slurm]:
    """While open, a Slurm that keeps its files in a directory. What its jobs run ends with it."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "state").mkdir(exist_ok=True)
    controller, *ports = _free(1 + len(NODES))
    conf = CONF.format(
        host=socket.gethostname().partition(".")[0],
        user="root",
        home=home,
        controller=controller,
        again=AGAIN,
        lost=LOST,
        **dict(zip(NODES, ports, strict=True)),
    )
    (home / "slurm.conf").write_text(conf, encoding="utf-8")
    key = home / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    slurm = Slurm(home)
    try:
        slurm.start("munged")
        slurm.wait((home / "munge.sock").exists, 30, "munged listens")
        for name in ("slurmctld", *NODES):
            slurm.start(name)
        slurm.wait(
            lambda: slurm.ask("sinfo", "-h", "-N", "-t", "idle").count("main") == len(NODES), 60, "idle nodes"
        )
        yield slurm
    finally:
        slurm.ask("scancel", "--user=root", "--signal=KILL", "--full")
        for daemon in reversed(list(slurm.daemons.values())):
            daemon.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()


def _free(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    with two_nodes(Path(sys.argv[1]).absolute()) as cluster:
        print(cluster.ask("sinfo", "-N"))
        print(f"export SLURM_CONF={cluster.home / 'slurm.conf'}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
