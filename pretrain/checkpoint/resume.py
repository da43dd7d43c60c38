"""Checks that a run can resume from a checkpoint with the settings of this command."""

from dataclasses import asdict
from typing import Any

from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer_spec import TokenizerSpec

from ..config.init_from import folder_of
from ..config.job import JobConfig
from ..config.optim import OptimConfig
from ..config.vocab import VocabConfig
from ..data import Data


def check_resumable(config: JobConfig, data: Data, rows: int, manifest: dict[str, Any]) -> None:
    """Raises ValueError if a setting differs that must not change: model, vocabulary, optimizer, order of the data.

    `vocab.untie_at` may change while it is in the future. A checkpoint of imported weights has consumed no samples:
    then the order of the data is free, and the tokenizer may change if each row keeps its token.
    """
    saved, now = manifest["config"], asdict(config)
    known_then = {  # a key that is newer than the checkpoint had its default
        "model": asdict(type(config.model)()) | saved["model"],
        "vocab": asdict(VocabConfig()) | saved["vocab"],
        "optim": {"name": OptimConfig.name} | saved["optim"],
    }
    saved = saved | known_then
    drawn = not manifest.get("weights_only", False)
    kept = [("seed",), ("train", "seq_len"), ("data", "packing"), ("optim", "name")] if drawn else []
    kept += [("vocab", key) for key in ("multiple", "tie", "softcap", "embed_scale")]
    kept += [("model", key) for key in now["model"]]
    for path in kept:
        was, current = saved, now
        for key in path:
            was, current = was.get(key), current[key]
        if was != current:
            _refuse(config, f"{'.'.join(path)}={was}", f"{current}")
    began = saved.get("init_from")
    if config.init_from is not None and (began is None or folder_of(began) != folder_of(config.init_from).absolute()):
        _refuse(config, f"init_from={began or 'null'}", config.init_from)
    split = config.vocab.split_otherwise(saved["vocab"], manifest["step"])
    if split is not None:
        _refuse(config, *split)
    if manifest["vocab_size"] != rows:
        _refuse(
            config, f"{manifest['vocab_size']} vocabulary rows{_source(saved, True)}", f"{rows}{_source(now, True)}"
        )
    if manifest["tokenizer_fingerprint"] != data.tokenizer_fingerprint and (drawn or not _same_rows(config, data)):
        before, given = (
            f"{f'tokenizer {digest[:12]}' if digest else 'no tokenizer'}{_source(settings)}"
            for digest, settings in ((manifest["tokenizer_fingerprint"], saved), (data.tokenizer_fingerprint, now))
        )
        _refuse(config, before, given)


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


def _refuse(config: JobConfig, was: str, now: str) -> None:
    raise ValueError(
        f"run.dir={config.run.dir} holds a run with {was}, this command has {now}: choose another run.dir, or the"
        " settings of that run"
    )
