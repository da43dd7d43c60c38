"""The cluster itself: what the scenarios take for granted."""

import time

from tests.slurm.cluster import HOSTS, NODES, running


def test_two_nodes_run_a_job_and_sacct_reports_it(slurm, tmp_path):
    said = tmp_path / "said"
    slurm.call(
        "sbatch", "-N2", "--ntasks-per-node=1", f"--output={said}", "--wait", "--wrap=srun printenv SLURMD_NODENAME"
    )
    assert sorted(said.read_text().split()) == [*NODES]
    slurm.wait_until(lambda: "COMPLETED" in slurm.call("sacct", "-n", "-X", "-o", "State"))


def test_cluster_without_accounting_leaves_no_process(installed, tmp_path):
    hosts = HOSTS.read_text()
    with running(accounting=False) as cluster:
        cluster.call("sbatch", "-N2", "--ntasks-per-node=1", "--wrap=srun sleep 600", f"--chdir={tmp_path}")
        cluster.wait_until(lambda: all(len(cluster.on_node(node)) > 1 for node in NODES))
        started = cluster.processes()
        assert {"munged", "slurmctld", "slurmd", "slurmstepd", "sleep"} <= {process.name() for process in started}
    time.sleep(0.1)
    assert not [process for process in started if process.is_running()]
    assert HOSTS.read_text() == hosts and not cluster.folder.exists()
