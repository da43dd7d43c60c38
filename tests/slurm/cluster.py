"""A real Slurm of two nodes on this machine: its own daemons, ports and folders, on loopback.

It does not read, write or start the system's Slurm, munge or MariaDB. Each process of a job must know the names n1
and n2, so they are in /etc/hosts while the cluster runs.
"""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "slurmdbd", "mariadbd", "mariadb-install-db")
PACKAGES = "slurm-wlm slurmdbd munge mariadb-server-core mariadb-client-core"
NODES = ("n1", "n2")
CPUS = 2  # reported by each node, whatever the machine has
HOSTS = Path("/etc/hosts")
PR_SET_PDEATHSIG = 1
PATIENCE = 60.0  # seconds, for anything that should take a few
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])

CONFIG = """
ClusterName=rowshard
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=200000,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=20
SlurmctldTimeout=20
InactiveLimit=0
KillWait=10
MinJobAge=300
Waittime=0
{accounting}
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=10 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""
ACCOUNTING = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/linux"""
NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none\nJobAcctGatherType=jobacct_gather/none"
DATABASE = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={storage}
StorageUser=root
StorageLoc=accounts
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
"""


def missing() -> str | None:
    """Returns why a cluster cannot run here, or None."""
    if os.geteuid():
        return "a Slurm of two nodes needs root"
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if absent:
        return (
            f"no {', '.join(absent)}: apt-get install slurm-wlm slurmdbd munge mariadb-server-core mariadb-client-core"
        )
    return None


class Slurm:
    """A running cluster. `environment`: of a user's shell on the login node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "slurm.conf"
        self.environment = os.environ | {"SLURM_CONF": str(self.config), "PATH": PATH, "OMP_NUM_THREADS": "1"}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self, accounting: bool) -> None:
        self._munge()
        host, (controller, *ports) = socket.gethostname().split(".")[0], free_ports(1 + len(NODES))
        machine = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={CPUS} RealMemory=4200"
        nodes = "\n".join(
            f"NodeName={node} {machine} Port={port} State=UNKNOWN" for node, port in zip(NODES, ports, strict=True)
        )
        settings = self._database() if accounting else NO_ACCOUNTING
        self.config.write_text(
            CONFIG.format(host=host, port=controller, folder=self.folder, accounting=settings, nodes=nodes)
        )
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        if accounting:
            self._start("slurmdbd", "-D")
            self.wait_until(lambda: self._answers("sacctmgr", "-n", "show", "cluster"))
            self.call("sacctmgr", "-i", "add", "cluster", "rowshard")
        self._start("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait_until(lambda: self.call("sinfo", "-h", "-p", "low", "-o", "%t").split() == ["idle"])

    def call(self, *command: str) -> str:
        """Returns the output of a Slurm command. Raises CalledProcessError with it if the command fails."""
        done = subprocess.run(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}"
        return done.stdout

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node, name=node)

    def lose_node(self, node: str) -> None:
        """Kills the node's slurmd and its children with kill -9, like a power failure, and marks the node as down."""
        for process in [psutil.Process(self.daemons.pop(node).pid), *self.on_node(node)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def on_node(self, node: str) -> list[psutil.Process]:
        """Returns the job's processes on the node, and their slurmstepd."""
        tasks = [process for process in self.processes() if environment_of(process).get("SLURMD_NODENAME") == node]
        steps = {parent for task in tasks for parent in parents(task) if parent.name().startswith("slurmstepd")}
        return [*steps, *tasks]

    def processes(self) -> list[psutil.Process]:
        """Returns the processes that the cluster has started, and their children: all have our SLURM_CONF.

        A slurmstepd writes its title over its environment, so it is known by its folder.
        """
        ours = [
            p
            for p in psutil.process_iter()
            if environment_of(p).get("SLURM_CONF") == str(self.config) or folder_of(p) == str(self.folder)
        ]
        return [process for process in ours if process.pid != os.getpid()]

    def wait_until(self, there: Callable[[], object], seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not there():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            assert not dead and time.monotonic() < deadline, f"ended: {dead}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def stop(self) -> None:
        """Ends the started processes only."""
        for signal_number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            ours = self.processes()
            for process in ours:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal_number)
            psutil.wait_procs(ours, seconds)
        for daemon in self.daemons.values():
            daemon.wait(PATIENCE)

    def _start(self, program: str, *arguments: str, name: str | None = None) -> None:
        """Starts a daemon in its own session, with its output in a log."""
        found = shutil.which(program, path=PATH)
        assert found is not None
        with open(self.folder / f"{name or program}.out.log", "a") as log:
            self.daemons[name or program] = subprocess.Popen(
                [found, *arguments],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        names = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in names.items()]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", *files)
        self.wait_until((self.folder / "munge.socket").exists)

    def _database(self) -> str:
        """Starts MariaDB, and writes slurmdbd's settings. Returns slurmctld's."""
        data, (storage, port) = self.folder / "mariadb", free_ports(2)
        options = [f"--datadir={data}", "--user=root"]
        log = subprocess.run(
            ["mariadb-install-db", "--no-defaults", "--auth-root-authentication-method=normal", *options],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert log.returncode == 0, log.stdout + log.stderr
        options += [
            f"--socket={data}/socket",
            f"--pid-file={data}/pid",
            f"--port={storage}",
            "--bind-address=127.0.0.1",
        ]
        options += ["--skip-grant-tables", "--innodb-flush-log-at-trx-commit=0", "--innodb-log-file-size=8M"]
        self._start("mariadbd", "--no-defaults", *options)
        self.wait_until(lambda: listens(storage))
        settings = self.folder / "slurmdbd.conf"
        settings.touch(mode=0o600)
        settings.write_text(DATABASE.format(folder=self.folder, port=port, storage=storage))
        return ACCOUNTING.format(folder=self.folder, port=port)

    def _answers(self, *command: str) -> bool:
        return subprocess.run(command, env=self.environment, capture_output=True, timeout=PATIENCE).returncode == 0


@contextmanager
def running(accounting: bool = True) -> Iterator[Slurm]:
    """Yields a cluster, and removes all of it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path: a socket's may have 107 characters
    folder.chmod(0o755)
    with names_in_hosts(folder.name):
        cluster = Slurm(folder)
        try:
            cluster.start(accounting)
            yield cluster
        finally:
            cluster.stop()
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def names_in_hosts(owner: str) -> Iterator[None]:
    """Adds a line for this cluster, so that several clusters can share the file."""
    line = f"\n127.0.0.1 {' '.join(NODES)} # {owner}\n"
    with open(HOSTS, "a") as hosts:
        hosts.write(line)
    try:
        yield
    finally:
        HOSTS.write_text(HOSTS.read_text().replace(line, ""))


def die_with_parent() -> None:
    """Ends the child even if the tests are killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def folder_of(process: psutil.Process) -> str:
    try:
        return process.cwd() if process.name().startswith("slurmstepd") else ""
    except (psutil.Error, OSError):
        return ""


def parents(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.parents()
    except psutil.Error:
        return []
