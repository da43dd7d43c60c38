"""The corpora of a run and how windows are cut from them. Group data."""

import math
import os
from dataclasses import dataclass, field
from typing import Any


@dataclass
class DataConfig:
    """The corpora of a run and how windows are cut from them."""

    #: folder made by data_prep/tokenize.py, or PREFIX of a Megatron pair PREFIX.bin and PREFIX.idx
    path: str = ""
    corpora: dict[str, str] = field(default_factory=dict)  # instead of path: several paths, by names of your own
    #: share of each corpus in the samples, by name; only their ratios count; none: by number of tokens
    weights: dict[str, float] = field(default_factory=dict)
    stages: dict[int, Any] = field(default_factory=dict)  # other weights from a sample number of the run on
    #: causal: a token sees all earlier tokens of its window; masked: only those of its document, whose positions begin
    #: at 0, and the first token of a document is no target
    documents: str = "causal"
    #: none: windows are cut from the stream of documents every T tokens; best_fit: they are filled with whole documents
    packing: str = "none"
    prefetch: int = 2  # batches that are prepared ahead of the step

    def __post_init__(self) -> None:
        if not self.path and not self.corpora:
            raise ValueError("data.path is missing: give a folder made by data_prep/tokenize.py")
        if self.path and self.corpora:
            raise ValueError(f"data.path={self.path} must not be given beside data.corpora: make it one of them")
        if not all(self.corpora.values()):
            raise ValueError("data.corpora must give each a path: a folder made by data_prep/tokenize.py")
        given = {"data.weights": self.weights} if self.weights else {}
        given |= {f"data.stages.{begin}": stage for begin, stage in self.stages.items()}
        for key, weights in given.items():
            if not isinstance(weights, dict) or weights.keys() != self.corpora.keys():
                names = ", ".join(self.corpora) or "none"
                raise ValueError(f"{key}={weights} must give a weight to each of data.corpora: {names}")
            for name, weight in weights.items():
                if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                    raise ValueError(f"{key}.{name}={weight} must be a number of at least 0")
            if not sum(weights.values()):
                raise ValueError(f"{key} must have a weight above 0")
        if min(self.stages, default=1) < 1:
            raise ValueError(f"data.stages.{min(self.stages)} must be the number of a sample, from 1 on")
        if self.documents not in ("causal", "masked"):
            raise ValueError(f"data.documents={self.documents} must be causal or masked")
        if self.packing not in ("none", "best_fit"):
            raise ValueError(f"data.packing={self.packing} must be none or best_fit")
        if self.packing == "best_fit" and not self.masked:
            raise ValueError(
                f"data.documents={self.documents} must be masked with data.packing=best_fit: neighbours in a window"
                " have nothing to do with each other"
            )
        if self.prefetch < 1:
            raise ValueError(f"data.prefetch={self.prefetch} must be at least 1")

    @property
    def paths(self) -> dict[str, str]:
        """The paths of the corpora, by their titles."""
        return self.corpora or {self.path: self.path}

    def resolve(self) -> None:
        """Makes the paths whole: a job may run in another folder."""
        self.path = self.path and os.path.abspath(self.path)
        self.corpora = {title: os.path.abspath(path) for title, path in self.corpora.items()}

    @property
    def masked(self) -> bool:
        return self.documents == "masked"
