"""Checks that a run can resume from a checkpoint, or decay from one, with the settings of this command."""

from dataclasses import asdict
from typing import Any

from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer_spec import TokenizerSpec

from ..config.init_from import folder_of
from ..config.job import JobConfig
from ..config.lengths import Batches
from ..config.optim import OptimConfig
from ..config.vocab import VocabConfig
from ..data import Data
from ..data.intervals import below


def check_resumable(config: JobConfig, data: Data, rows: int, manifest: dict[str, Any], key: str = "run.dir") -> None:
    """Raises ValueError if a setting differs that must not change: model, vocabulary, optimizer, order of the data.

    key: the setting that names the run of the checkpoint, run.dir or decay_from.

    `vocab.untie_at` may change while it is in the future. A checkpoint of imported weights has consumed no samples:
    then the order of the data is free, and the tokenizer may change if each row keeps its token. If batches grow, those
    of the steps done must not change.
    """
    saved, now = manifest["config"], asdict(config)
    source = f"run.dir={config.run.dir}" if key == "run.dir" else f"decay_from={config.decay_from}"
    known_then = {  # a key that is newer than the checkpoint had its default
        "model": asdict(type(config.model)()) | saved["model"],
        "vocab": asdict(VocabConfig()) | saved["vocab"],
        "optim": {"name": OptimConfig.name, "base_width": None} | saved["optim"],
    }
    saved = saved | known_then
    drawn = not manifest.get("weights_only", False)
    kept = [("seed",), ("train", "seq_len"), ("data", "packing")] if drawn else []
    kept += [("optim", name) for name in ("name", "base_width") if drawn]
    kept += [("vocab", name) for name in ("multiple", "tie", "softcap", "embed_scale")]
    kept += [("model", name) for name in now["model"]]
    for path in kept:
        was, current = saved, now
        for part in path:
            was, current = was.get(part), current[part]
        if was != current:
            _refuse(source, f"{'.'.join(path)}={was}", f"{current}")
    if drawn:
        _check_left_out(source, config, manifest)
    began = saved.get("init_from")
    if config.init_from is not None and (
        began is None or folder_of(began).absolute() != folder_of(config.init_from).absolute()
    ):
        _refuse(source, f"init_from={began or 'null'}", config.init_from)
    if key == "run.dir" and config.decay_from not in (None, saved.get("decay_from")):
        _refuse(source, f"decay_from={saved.get('decay_from') or 'null'}", str(config.decay_from))
    _check_batches(source, config, saved["train"], sum(manifest["samples"].values()))
    split = config.vocab.split_otherwise(saved["vocab"], manifest["step"])
    if split is not None:
        _refuse(source, *split)
    if manifest["vocab_size"] != rows:
        _refuse(
            source, f"{manifest['vocab_size']} vocabulary rows{_source(saved, True)}", f"{rows}{_source(now, True)}"
        )
    if manifest["tokenizer_fingerprint"] != data.tokenizer_fingerprint and (drawn or not _same_rows(config, data)):
        before, given = (
            f"{f'tokenizer {digest[:12]}' if digest else 'no tokenizer'}{_source(settings)}"
            for digest, settings in ((manifest["tokenizer_fingerprint"], saved), (data.tokenizer_fingerprint, now))
        )
        _refuse(source, before, given)


def check_stable(config: JobConfig, manifest: dict[str, Any]) -> None:
    """Raises ValueError unless the checkpoint of `decay_from` is in the stable phase of its own run."""
    was, steps = manifest["config"]["optim"], manifest["config"]["train"]["steps"]
    of_phases = {key: was[key] for key in ("schedule", "warmup_steps", "decay_fraction", "decay_steps") if key in was}
    optim = OptimConfig(**of_phases)
    begin, end = optim.warmup(steps), steps - optim.decay(steps)
    if optim.schedule != "wsd" or not begin <= manifest["step"] <= end:
        phase = f"steps {begin} to {end}" if optim.schedule == "wsd" else f"none with optim.schedule={optim.schedule}"
        raise ValueError(
            f"decay_from={config.decay_from} must be in the stable phase of its run, which has {phase}: name another"
            " checkpoint as RUN/STEP"
        )


def _check_batches(source: str, config: JobConfig, was: dict[str, Any], position: int) -> None:
    """Raises ValueError if batches grow, now or then, and the sizes differ below the run's position.

    The number of steps is not enough: samples that were left out move the position, but take no step.
    """
    schedule = was.get("batch_schedule", {})
    then, now = Batches.of(was["global_batch"], schedule, config.seq_len), config.train.batches
    past = [[entry for entry in batches.sizes if entry[0] < position] for batches in (then, now)]
    if (schedule or config.train.batch_schedule) and past[0] != past[1]:
        sizes = [" ".join(f"{size} from sample {begin}" for begin, size in b.sizes) for b in (then, now)]
        _refuse(source, f"batches of {sizes[0]}", f"{sizes[1]}, which differ below sample {position}, its position")


def _check_left_out(source: str, config: JobConfig, manifest: dict[str, Any]) -> None:
    """Raises ValueError if data.skip differs below the run's position: those samples are consumed, or left out."""
    position, by_guard = sum(manifest["samples"].values()), manifest.get("left_out", [])
    was, now = (
        below([*skip, *by_guard], position) for skip in (manifest["config"]["data"].get("skip", []), config.data.skip)
    )
    if was != now:
        raise ValueError(
            f"data.skip={config.data.skip} must not change samples below {position}, the position of {source},"
            f" which left out {was} of them: choose another {source.partition('=')[0]}, or the same samples"
        )


def _source(settings: dict[str, Any], of_rows: bool = False) -> str:
    """Names the setting that brought the tokenizer, or the number of rows, as in " (data.path=data/mine)"."""
    if of_rows and settings["vocab"].get("size") is not None:
        return f" (vocab.size={settings['vocab']['size']})"
    data = settings["data"]
    corpora = [f"data.corpora.{title}={path}" for title, path in (data.get("corpora") or {}).items()]
    path, *_ = [*corpora, f"data.path={data['path']}"]
    return f" ({path})"


def _same_rows(config: JobConfig, data: Data) -> bool:
    """Returns True if the tokenizers of data and run agree on the rows, or if one of them is unknown."""
    of_run = config.run_dir / TOKENIZER_FOLDER
    if data.tokenizer is None or not of_run.is_dir():
        return True
    return TokenizerSpec.load(of_run).has_rows_of(TokenizerSpec.load(data.tokenizer))


def _refuse(source: str, was: str, now: str) -> None:
    raise ValueError(
        f"{source} holds a run with {was}, this command has {now}: choose another {source.partition('=')[0]}, or the"
        " settings of that run"
    )
