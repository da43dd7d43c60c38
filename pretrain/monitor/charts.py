"""Layout of TensorBoard's Custom Scalars tab: an overview, and one chart per quantity with a line per part."""

from collections.abc import Iterable, Iterator

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import metadata
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent

from .scalars import BIN, BY_KEY, CORPUS, DETAILS, LAYER, PART, SCALARS, TASK, Scalar

OVERVIEW = {
    "Loss, nats/token": ("loss", "val_loss", "val_loss_ema"),
    "Validation, bits/byte": ("val_bits_per_byte", "val_bits_per_byte_ema"),
    "Learning rate": ("lr",),
    "Gradient norm": ("grad_norm",),
    "Throughput, tokens/s": ("tokens_per_s",),
    "Model FLOPs utilization": ("mfu",),
    "Peak memory, GiB": ("peak_memory_gib",),
}
CATEGORIES = {  # by the form of the key
    PART: "Parts of a step",
    CORPUS: "Corpora",
    TASK: "Tasks",
    BIN: "Rows and tokens by frequency",
    "/topNpct": "Spectrum of the matrix",
    LAYER: "Lens by layer",
    BIN + LAYER: "Lens by frequency and layer",
}


class Charts:
    """The charts that have data. Each start and each run brings the same ones, so TensorBoard merges those of several
    runs.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        """keys: those logged so far."""
        self._lines: set[tuple[str, ...]] = set()  # parts of the keys that decide which charts there are
        self.changed = False
        self.add(keys)

    def add(self, keys: Iterable[str]) -> None:
        """Notes keys with data; `changed` is True if that asks for another layout."""
        for key in keys:
            head, *parts = key.split("/")
            if head in BY_KEY:
                line = (head, *parts[:-1], "") if parts else (head,)
                self.changed |= line not in self._lines
                self._lines.add(line)

    def summary(self) -> Summary:
        """The layout, as TensorBoard reads it."""
        self.changed = False
        text = Layout(category=list(self._categories())).SerializeToString()
        tensor = TensorProto(dtype=DT_STRING, string_val=[text])
        about = metadata.create_summary_metadata()
        return Summary(value=[Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, metadata=about, tensor=tensor)])

    def _categories(self) -> Iterator[Category]:
        overview = []
        for title, keys in OVERVIEW.items():
            tags = [f"^{BY_KEY[key].tag}$" for key in keys if (key,) in self._lines]
            if tags:
                overview.append(_chart(title, tags))
        yield Category(title="Overview", chart=overview)
        for form, title in CATEGORIES.items():
            charts = [chart for scalar in SCALARS if form in scalar.forms for chart in self._charts(scalar)]
            if charts:
                yield Category(title=title, chart=charts, closed=True)

    def _charts(self, scalar: Scalar) -> Iterator[Chart]:
        """One chart with a line per part; if a key has two parts, one for each first part."""
        unit = f", {scalar.unit}" if scalar.unit else ""
        for line in sorted(self._lines):
            if line[0] == scalar.key and len(line) > 1:
                between = "".join(f"/{part}" for part in line[1:-1])
                yield _chart(f"{scalar.title}{unit}{between}", [f"^{DETAILS}/{scalar.key}{between}/[^/]+$"])


def _chart(title: str, tags: list[str]) -> Chart:
    return Chart(title=title, multiline=MultilineChartContent(tag=tags))
