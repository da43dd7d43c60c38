"""Settings of the data: the corpora of a run and how they are cut into windows. Group data."""

import math
import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class DataConfig:
    """The corpora of a run and how they are cut into windows."""

    #: folder made by data_prep/tokenize.py, or its URL, such as s3://BUCKET/FOLDER; or PREFIX of a Megatron pair
    #: PREFIX.bin and PREFIX.idx
    path: str = ""
    corpora: dict[str, str] = field(default_factory=dict)  # several corpora instead of path: name to path
    #: share of each corpus in the samples, by name; only the ratios matter; empty: by number of tokens
    weights: dict[str, float] = field(default_factory=dict)
    #: other weights for a later part of the run: first sample number to weights by name; empty: none
    stages: dict[int, Any] = field(default_factory=dict)
    #: causal: a token attends to all earlier tokens of its window; masked: to earlier tokens of its own document only;
    #: positions then restart at 0 in each document, and the first token of a document is not a target
    documents: str = "causal"
    #: none: cut the stream of documents into windows of T tokens; best_fit: pack whole documents into windows
    packing: str = "none"
    #: intervals [first, stop) of sample numbers that are left out, such as [[1200,1216]]; the others keep their order
    skip: list[list[int]] = field(default_factory=list)
    prefetch: int = 2  # batches prepared in advance
    #: folder on each node for what is read from URLs; $NAMES are those of the node; empty: $SLURM_TMPDIR/rowshard, or
    #: ~/.cache/rowshard
    cache: str = ""

    def __post_init__(self) -> None:
        if not self.path and not self.corpora:
            raise ValueError("data.path is missing: give a folder made by data_prep/tokenize.py")
        if self.path and self.corpora:
            raise ValueError(f"data.path={self.path} must not be given together with data.corpora: add it there")
        if not all(self.corpora.values()):
            raise ValueError("data.corpora must give a path for each corpus: a folder made by data_prep/tokenize.py")
        for title, path in self.paths.items():
            _check_url(self.key_of(title), path)
        if "://" in self.cache:
            raise ValueError(f"data.cache={self.cache} must be a folder of the node, not a URL")
        given = {"data.weights": self.weights} if self.weights else {}
        given |= {f"data.stages.{begin}": stage for begin, stage in self.stages.items()}
        for key, weights in given.items():
            if not isinstance(weights, dict) or weights.keys() != self.corpora.keys():
                names = ", ".join(self.corpora) or "none"
                raise ValueError(f"{key}={weights} must give one weight per corpus of data.corpora: {names}")
            for name, weight in weights.items():
                if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                    raise ValueError(f"{key}.{name}={weight} must be a number of at least 0")
            if not sum(weights.values()):
                raise ValueError(f"{key} must have a weight above 0")
        if min(self.stages, default=1) < 1:
            raise ValueError(f"data.stages.{min(self.stages)} must be a sample number, at least 1")
        if self.documents not in ("causal", "masked"):
            raise ValueError(f"data.documents={self.documents} must be causal or masked")
        if self.packing not in ("none", "best_fit"):
            raise ValueError(f"data.packing={self.packing} must be none or best_fit")
        if self.packing == "best_fit" and not self.masked:
            raise ValueError(
                f"data.documents={self.documents} must be masked with data.packing=best_fit: documents packed into"
                " one window are unrelated"
            )
        for interval in self.skip:
            if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
                text = ",".join(map(str, interval))
                raise ValueError(
                    f"data.skip=[[{text}]] must be [first, stop) with 0 <= first < stop, such as [[1200,1216]]"
                )
        if self.prefetch < 1:
            raise ValueError(f"data.prefetch={self.prefetch} must be at least 1")

    @property
    def paths(self) -> dict[str, str]:
        """Paths of the corpora, by title."""
        return self.corpora or {self.path: self.path}

    def key_of(self, title: str) -> str:
        """Returns the setting that has the path of this corpus."""
        return f"data.corpora.{title}" if self.corpora else "data.path"

    def resolve(self) -> None:
        """Makes the paths absolute, because a job may run in another folder."""
        self.path = self.path and _absolute(self.path)
        self.corpora = {title: _absolute(path) for title, path in self.corpora.items()}
        self.cache = self.cache and _absolute(os.path.expanduser(self.cache))

    @property
    def reads(self) -> list[str]:
        """Folders of this machine, or of the file system that it shares with the nodes, that a run reads."""
        local = [path for path in self.paths.values() if "://" not in path]
        return [*local, self.cache] if self.cache and "$" not in self.cache else local

    @property
    def masked(self) -> bool:
        return self.documents == "masked"


def _check_url(key: str, path: str) -> None:
    """Raises ValueError if a URL has a password, or a token behind a question mark. Does not print them."""
    if "://" not in path:
        return
    parts = urlsplit(path)
    if parts.password or (parts.query and parts.scheme in ("http", "https")):
        raise ValueError(
            f"{key}={parts.scheme}://{parts.hostname}… must not have a password or a query: settings are saved and"
            " shown; give credentials to the store's client (docs/data.md, Object stores)"
        )


def _absolute(path: str) -> str:
    """Makes a path absolute. Leaves a URL, and a path that begins with a variable of the node."""
    return path if "://" in path or path.startswith("$") else os.path.abspath(path)
