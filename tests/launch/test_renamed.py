"""A setting's old name still works on the command line and in the files of an old run."""

import json
from dataclasses import fields

import yaml

from data_prep import app
from data_prep.clean import CleanConfig
from data_prep.mistakes import unknown
from data_prep.renamed import RENAMED, renamed
from launch import local
from launch.restart import RestartConfig
from launch.sweep import folders
from pretrain.changes import settings_changed
from pretrain.compose import PARTS, load_config, write_config
from pretrain.tie_report.report import _flat
from tests.in_process import in_process
from tests.launch.test_resume import _train, frozen, resumed  # noqa: F401

OF_A_RUN = [old for old in RENAMED if old.split(".")[0] in PARTS]


def old_names(settings: dict) -> dict:
    for old in OF_A_RUN:
        group, key = old.split(".")
        settings[group][key] = settings[group].pop(RENAMED[old].split(".")[1])
    return settings


def test_no_old_name_is_a_setting_and_each_new_one_is():
    parts = {**PARTS, "clean": CleanConfig, "restart": RestartConfig}
    groups = {name: {item.name for item in fields(parts[name])} for name in {old.split(".")[0] for old in RENAMED}}
    for old, new in RENAMED.items():
        (group, key), (new_group, new_key) = old.split("."), new.split(".")
        assert group == new_group and new_key in groups[group] and key not in groups[group]


def test_signs_and_values_stay():
    assert renamed(["+train.hang_after=a=b", "train.hang_timeout=1", "~monitor.lens"]) == {
        "+train.hang_after=a=b": "+train.hang_timeout=a=b",
        "~monitor.lens": "~monitor.lens_every",
    }


def test_a_typed_old_name_sets_the_new_one_and_says_so(tmp_path):
    typed = [f"{old}=-7" for old in RENAMED if not old.startswith("clean.")]
    for setting in typed:
        old = setting.split("=")[0]
        done = in_process(local.main, "run.dir=x", "data.path=x", setting)
        warning, error = done.stderr.splitlines()
        assert warning == f"warning: {old} is now called {RENAMED[old]}"
        assert done.returncode == 2 and error.startswith(f"error: {RENAMED[old]}=-7"), error
    done = in_process(app.main, f"out={tmp_path / 'out'}", "corpus=files", "corpus.paths=[x]", "clean.unlike=[y]")
    assert done.stderr.splitlines()[0] == "warning: clean.unlike is now called clean.exclude"
    assert "error: clean.exclude= needs clean.deduplicate=true" in done.stderr


def test_the_files_of_an_old_run_are_read(frozen, tmp_path):  # noqa: F811
    path = frozen / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["train"]["hang_timeout"], settings["checkpoint"]["reserve_seconds"] = 77.0, 5.0
    path.write_text(yaml.safe_dump(settings))
    now = load_config(path)
    path.write_text(yaml.safe_dump(old_names(settings)))
    assert load_config(path) == now and now.train.hang_timeout == 77.0
    assert resumed([f"run.dir={frozen}"]) == now
    done = in_process(local.main, f"resume={frozen}", "train.hang_after=-5")
    assert "error: train.hang_timeout=-5.0 must not be negative" in done.stderr, done.stderr
    step = tmp_path / "step"
    step.mkdir()
    (step / "manifest.json").write_text(json.dumps({"config": settings}))
    now.train.hang_timeout = 78.0
    write_config(now, None)
    assert settings_changed(frozen, step) == [{"key": "train.hang_timeout", "was": 77.0, "is": 78.0}]


def test_error_about_an_old_name_has_the_new_one():
    assert unknown("train.hang_after", ["hang_timeout"]) == "train.hang_after is now called train.hang_timeout"


def test_sweep_by_an_old_name_resumes_its_folders(tmp_path):
    jobs = [[f"monitor.embedding_every={n}", "seed=1"] for n in (0, 50)]
    assert [folder.name for folder in folders(tmp_path, jobs)] == [f"monitor.embedding_every-{n}" for n in (0, 50)]
    (tmp_path / "monitor.embedding-50").mkdir()
    assert [folder.name for folder in folders(tmp_path, jobs)][1] == "monitor.embedding-50"
    assert folders(tmp_path, jobs[:1]) == [tmp_path]


def test_the_tie_report_compares_a_setting_by_its_new_name():
    assert _flat({"train": {"hang_after": 5.0, "steps": 1}}) == {"train.hang_timeout": 5.0, "train.steps": 1}
