"""Checks a job against the cluster before it is submitted: which Python its setup activates, and whether its partition
can ever start it. Not part of cluster.py, which describes a job and asks no cluster.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

from data_prep.command import warn
from launch.cluster import ClusterConfig

ANSWER_SECONDS = 10  # if Slurm takes longer, sbatch decides
ACTIVATES = re.compile(
    r"(?:^|[;&|]\s*)\s*(?:(?:source|\.)\s+(?P<script>\S*activate)\b|(?:conda|mamba|micromamba|pyenv)\s+activate\b"
    r"|(?:module\s+(?:load|add)|ml|spack\s+load)\s[^;&|]*(?:python|conda|mamba|miniforge))",
    re.IGNORECASE,
)


def check(cluster: ClusterConfig, dry_run: bool) -> None:
    """Warns if the setup activates an unused Python. Raises ValueError if the partition can never start the job."""
    for line in cluster.setup:
        if unused := unused_activation(line, cluster):
            warn(unused)
    if not dry_run:
        check_partition(cluster)


def unused_activation(line: str, cluster: ClusterConfig) -> str:
    """Returns a warning if a line of cluster.setup activates a Python that the tasks do not use; else ""."""
    found = ACTIVATES.search(line)
    if found is None or cluster.python is not None:
        return ""
    where = " of the container" if cluster.container else ""
    if not where and found["script"] and Path(found["script"].strip("'\"")).parent == Path(sys.executable).parent:
        return ""
    instead = f"a command{where}" if where else "python, to take the one that setup activates"
    return (
        f"cluster.setup: `{line}` does not change the Python of the job: it runs {cluster.task_python}{where};"
        f" set cluster.python={instead}"
    )


def check_partition(cluster: ClusterConfig) -> None:
    """Raises ValueError if no partition of cluster.partition can ever start the job. A limit that a QOS may lift is a
    warning. Does nothing if Slurm's answer cannot be parsed.
    """
    known = partitions(_answer("scontrol", "--oneliner", "--all", "show", "partition"))
    if not known or "clusters" in cluster.sbatch:
        return
    asked = os.environ.get("SBATCH_PARTITION") or cluster.partition
    names = asked.split(",") if asked else [name for name, facts in known.items() if facts.get("Default") == "YES"]
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"cluster.partition={asked}: {missing[0]} must be one of {', '.join(known)}")
    for rule in (_too_few_nodes, _too_large):
        wrong = [rule(cluster, name, known[name]) for name in names]
        if not names or not all(wrong):
            continue
        if rule is _too_large and cluster.qos:
            warn(f"{wrong[0]}, unless cluster.qos={cluster.qos} lifts that")
        else:
            raise ValueError(wrong[0])


def partitions(said: str) -> dict[str, dict[str, str]]:
    """Parses scontrol's lines: properties of each partition, by name."""
    lines = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in said.splitlines()]
    return {line["PartitionName"]: line for line in lines if "PartitionName" in line}


def _too_few_nodes(cluster: ClusterConfig, name: str, known: dict[str, str]) -> str:
    """Returns a message if the partition has too few nodes, or too few with enough GPUs; else ""."""
    total_nodes = known.get("TotalNodes", "")
    if total_nodes.isdigit() and cluster.nodes > int(total_nodes):
        return f"cluster.nodes={cluster.nodes} must be at most {total_nodes}: partition {name} has no more nodes"
    said = _answer("sinfo", "--noheader", f"--partition={name}", "--format=%D|%G") if cluster.gpus_per_node else ""
    nodes = re.findall(r"^(\d+)\|(.+)$", said, re.MULTILINE)
    shown = sum(int(count) for count, _ in nodes)
    if (
        "gpu" not in said or not total_nodes.isdigit() or shown < int(total_nodes)
    ):  # no GPUs listed, or cloud nodes that are off
        return ""
    gpus = [(int(count), sum(map(int, re.findall(r"\bgpu(?::[^:,(]+)?:(\d+)", gres)))) for count, gres in nodes]
    most, enough = max(each for _, each in gpus), sum(count for count, each in gpus if each >= cluster.gpus_per_node)
    if cluster.gpus_per_node > most:
        asked = f"cluster.gpus_per_node={cluster.gpus_per_node}"
        return f"{asked} must be at most {most}: no node of partition {name} has more"
    if cluster.nodes > enough:
        return (
            f"cluster.nodes={cluster.nodes} must be at most {enough}: partition {name} has no more nodes with"
            f" {cluster.gpus_per_node} GPUs"
        )
    return ""


def _too_large(cluster: ClusterConfig, name: str, known: dict[str, str]) -> str:
    """Returns a message if the job exceeds the partition's MaxNodes or MaxTime; else ""."""
    most, longest = known.get("MaxNodes", ""), known.get("MaxTime", "")
    if most.isdigit() and cluster.nodes > int(most):
        return f"cluster.nodes={cluster.nodes} must be at most {most}: MaxNodes of partition {name}"
    if cluster.minutes > _minutes(longest):
        return f"cluster.time={cluster.time} must be at most {longest}: MaxTime of partition {name}"
    return ""


def _minutes(time: str) -> float:
    """Reads scontrol's form, 1-12:00:00; infinite for UNLIMITED."""
    form = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", time)
    if form is None:
        return math.inf
    days, hours, minutes, seconds = (int(number or 0) for number in form.groups())
    return 1440 * days + 60 * hours + minutes + seconds / 60


def _answer(*command: str) -> str:
    """Returns what a Slurm command prints; "" if it is absent, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
