"""Jobs as they are submitted to Slurm."""

from launch.cluster import ClusterConfig


def test_job_submitted_inside_a_job_inherits_no_settings(fake_slurm, tmp_path, monkeypatch):
    fake_slurm.command("sbatch", "env | grep ^S > environment; echo Submitted batch job 12")
    job = ClusterConfig(time="1:00:00").job(tmp_path / "slurm", "name", [], [], [int])
    for variables, passed in (
        ({"SBATCH_ACCOUNT": "ours", "SLURM_CONF": "/etc/slurm.conf"}, {"SBATCH_ACCOUNT", "SLURM_CONF"}),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "9"}, {"SLURM_CONF"}),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        (submitted,) = job.submit()
        environment = (fake_slurm.folder / "environment").read_text().splitlines()
        assert submitted.job_id == "12"
        assert {line.split("=")[0] for line in environment if line.startswith(("SLURM_", "SBATCH_"))} == passed
