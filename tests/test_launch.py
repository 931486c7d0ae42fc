"""The shipped files for launchers, read as their own tools read them."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from d2l.config.load import load_config
from d2l.errors import ProcessError
from d2l.io.resources import resource
from d2l.train.processes import processes

FOLDER = resource("configs/launch")
# Of the options that sbatch's manual lists, those that a training job may need (slurm.schedmd.com/sbatch.html).
SBATCH = {
    *("account", "array", "chdir", "constraint", "cpus-per-gpu", "cpus-per-task", "dependency", "error", "exclusive"),
    *(
        "export",
        "gpus",
        "gpus-per-node",
        "gpus-per-task",
        "gres",
        "job-name",
        "mail-type",
        "mail-user",
        "mem",
        "nodelist",
    ),
    *("mem-per-gpu", "nodes", "no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output", "partition", "qos"),
    *("requeue", "reservation", "signal", "time", "time-min"),
}
# Fields of a SkyPilot task (docs.skypilot.co/en/latest/reference/yaml-spec.html).
TASK = {
    "name",
    "workdir",
    "num_nodes",
    "resources",
    "envs",
    "secrets",
    "file_mounts",
    "volumes",
    "setup",
    "run",
    "config",
}
RESOURCES = {
    "infra",
    "accelerators",
    "cpus",
    "memory",
    "instance_type",
    "use_spot",
    "disk_size",
    "disk_tier",
    "image_id",
}
RESOURCES |= {"ports", "labels", "any_of", "ordered", "job_recovery", "autostop", "network_tier", "accelerator_args"}


def test_every_file_is_looked_at() -> None:
    names = [f"accelerate_{name}.yaml" for name in ("one_gpu", "several_gpus", "sharded_base")]
    assert sorted(path.name for path in FOLDER.iterdir()) == [*names, "skypilot.yaml", "slurm.sh"]


@pytest.mark.parametrize("name", ["accelerate_one_gpu", "accelerate_several_gpus", "accelerate_sharded_base"])
def test_accelerate_reads_its_configurations(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses keys that it does not know
    assert (config.distributed_type == "MULTI_GPU", config.num_processes > 1) == ("one_gpu" not in name,) * 2


def test_the_command_of_the_sharded_base_has_settings_of_a_run() -> None:
    command = (FOLDER / "accelerate_sharded_base.yaml").read_text().partition("\n#\n")[0]
    settings = dict(re.findall(r"--set (\w+)=(\S+)", command))
    config = load_config(None, settings)
    assert (config.base_sharding, config.expert_weights) == ("full", "dequantize")


def test_the_slurm_script_is_bash_with_options_of_sbatch() -> None:
    script = FOLDER / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE))
    assert script.read_text().count("#SBATCH") == len(options)
    assert options.keys() <= SBATCH
    assert {"signal", "requeue"} <= options.keys()
    assert re.fullmatch(r"([RB]:)?(TERM|USR1|INT)@\d+", options["signal"])


@pytest.mark.parametrize("exists", [False, True])
def test_scripts_resume_a_run_that_exists(tmp_path: Path, exists: bool) -> None:
    """Their own lines that choose, run by bash."""
    run = tmp_path / "a run"
    run.mkdir()
    if exists:
        (run / "run.json").touch()
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())["run"]
    for text in (task, (FOLDER / "slurm.sh").read_text()):
        choice = text[text.index("if [ -e") :].partition("\nfi\n")[0] + "\nfi\n"
        command = f'CONFIG=c.yaml RUN="{run}"; {choice} printf "%s\\n" "${{train[@]}}"'
        said = subprocess.run(["bash", "-uc", command], check=True, capture_output=True, text=True).stdout.split("\n")
        assert said[:-1] == (["train", "--resume", str(run)] if exists else ["train", "c.yaml", "--output", str(run)])


def test_the_skypilot_task_has_documented_fields() -> None:
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    assert task.keys() <= TASK
    assert task["resources"].keys() <= RESOURCES
    assert task["resources"]["job_recovery"].keys() <= {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
    assert {mount["mode"] for mount in task["file_mounts"].values()} <= {"MOUNT", "COPY", "MOUNT_CACHED"}
    subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True, check=True)
    assert task["envs"]["RUN"].startswith(*task["file_mounts"])


def test_more_processes_than_gpus_are_refused_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would say that another process is gone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ProcessError, match=r"^2 processes were started on a machine with 1 GPU\(s\)"):
        processes()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert processes().device.type == "cpu"
