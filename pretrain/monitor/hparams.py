"""Settings of a run for TensorBoard's HParams tab, which compares runs, and as a table of text."""

import time
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import (
    DATA_TYPE_BOOL,
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

from .scalars import BEST, BY_KEY

FIRST = (
    "model.layers",
    "model.width",
    "optim.lr",
    "train.global_batch",
    "train.steps",
)  # TensorBoard shows five columns
METRICS = ("val_loss", "val_bits_per_byte", "loss", "tokens_per_s", "tokens")
UNCOMPARED = ("run.dir",)


def table(settings: dict[str, Any]) -> str:
    """All settings in Markdown."""
    rows = [f"| {key} | {_shown(value)} |" for key, value in settings.items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])


def session(settings: dict[str, Any]) -> list[Summary]:
    """The hyperparameters of a run, and which of its scalars the tab shows beside them."""
    known = {key: value for key, value in settings.items() if value is not None and key not in UNCOMPARED}
    metrics = [(BY_KEY[key].title, BY_KEY[key].tag) for key in METRICS]
    metrics[1:1] = [(f"Best {BY_KEY[key].title.lower()}", tag) for key, tag in BEST.items()]
    experiment = Experiment(
        hparam_infos=[HParamInfo(name=key, type=_type(known[key]), differs=key in FIRST) for key in known],
        metric_infos=[MetricInfo(name=MetricName(tag=tag), display_name=title) for title, tag in metrics],
    )
    start = SessionStartInfo(start_time_secs=time.time())
    for key, value in known.items():
        if isinstance(value, bool):
            start.hparams[key].bool_value = value
        elif isinstance(value, int | float):
            start.hparams[key].number_value = value
        else:
            start.hparams[key].string_value = str(value)
    return [
        _summary(metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=experiment)),
        _summary(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start)),
    ]


def _type(value: Any) -> int:
    if isinstance(value, bool):
        return DATA_TYPE_BOOL
    return DATA_TYPE_FLOAT64 if isinstance(value, int | float) else DATA_TYPE_STRING


def _summary(tag: str, content: HParamsPluginData) -> Summary:
    about = metadata.create_summary_metadata(content)
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text.replace("|", r"\|")
