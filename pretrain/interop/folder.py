"""Reads the folder of a Hugging Face model by rows: `config.json`, and safetensors in one or more files.

Only requested rows are read: of the matrix, a rank reads its own rows. Names and shapes are read without torch, because
launchers check them before any rank starts.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from data_prep.lfs import refuse_pointer
from data_prep.special_tokens import CONFIG, read_json

from ..families import Family, ModelConfig, WeightMapping, hugging_face_types
from ..families.family import HEAD

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, OUTPUT = "embedding.weight", "head.weight"  # our names, in a checkpoint
PIECE_BYTES = 64 << 20
DTYPES = ("F64", "F32", "BF16", "F16")  # supported dtypes of weights


class HFModel:
    """Hugging Face model in a folder, by our tensor names. Raises ValueError if a feature of it is not supported.

    model: settings of our body; vocab_size: V; tie: tied or untied.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.is_file():
            raise ValueError(f"{folder} is a file: give the folder of the model, {folder.parent}")
        self.config = read_json(folder / CONFIG)
        kind = self.config.get("model_type")
        known = hugging_face_types()
        if not isinstance(kind, str) or kind not in known:
            raise ValueError(f"{folder / CONFIG}: model_type={kind} must be one of {', '.join(known)}")
        self.family: Family = known[kind]
        self.format = self.family.hugging_face
        try:
            self.model: ModelConfig = self.format.model(self.config)
        except (ValueError, TypeError, AttributeError) as error:  # the last two from values of a wrong type
            raise ValueError(f"{folder / CONFIG}: {error}") from error
        self._opened: dict[tuple[Path, str], Any] = {}
        self.files = self._find()
        prefixed = any(name.startswith(self.format.prefix) for name in self.files)
        self.prefix = self.format.prefix if prefixed else ""
        self.mappings = {mapping.ours: mapping for mapping in self.format.mappings(self.model)}
        rows, width = self.vocab_size, self.model.width
        self.mappings[EMBEDDING] = WeightMapping(EMBEDDING, {self.format.embedding: rows}, width)
        if self.tie == "untied":
            self.mappings[OUTPUT] = WeightMapping(OUTPUT, {HEAD: rows}, width)
        self._check_names()

    @cached_property
    def vocab_size(self) -> int:
        embedding = self._named(self.format.embedding)
        if embedding not in self.files:
            only = f", only {HEAD}, but {CONFIG} does not have tie_word_embeddings=true" if HEAD in self.files else ""
            raise ValueError(f"{self.folder} has no tensor {self.format.prefix}{self.format.embedding}{only}")
        rows = next(iter(self._look(embedding).get_shape()), 0)
        said = self.config.get("vocab_size", rows)
        if said != rows:
            raise ValueError(f"{self.folder}: its embedding has {rows} rows, but {CONFIG} says vocab_size={said}")
        return rows

    @property
    def tie(self) -> str:
        return "tied" if self.config.get("tie_word_embeddings", self.format.tied) else "untied"

    def rows(self, name: str, start: int, stop: int) -> "Tensor":
        """Reads rows [start, stop) of our tensor `name`, in the dtype of the file."""
        import torch  # imported late: names and shapes do not need it

        mapping, parts, first = self.mappings[name], [], 0
        for theirs, rows in mapping.theirs.items():
            low, high = max(start - first, 0), min(stop - first, rows)
            if low < high:
                part = self._read(self._named(theirs))
                parts.append(part[:, low:high].T if mapping.transposed else part[low:high])
            first += rows
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _check_names(self) -> None:
        """Checks names and shapes of all tensors. Reads only headers, except for a separate head of a tied model."""
        known = set()
        for mapping in self.mappings.values():
            for theirs in mapping.theirs:
                self._check_shape(self._named(theirs), mapping.their_shape(theirs))
                known.add(self._named(theirs))
        if self.tie == "tied" and HEAD in self.files and HEAD not in known:
            self._check_head(*self.mappings[EMBEDDING].shape)
            known.add(HEAD)
        for theirs in sorted(self.files.keys() - known):
            if not theirs.endswith(self.format.buffers):
                raise ValueError(f"{self.files[theirs]} has tensor {theirs}, which our body does not have")

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        if name not in self.files:
            raise ValueError(f"{self.folder} has no tensor {name}")
        part = self._look(name)
        found, dtype = tuple(part.get_shape()), part.get_dtype()
        if found != expected:
            raise ValueError(f"{self.files[name]}: {name} has shape {found}, but {CONFIG} implies {expected}")
        if dtype not in DTYPES:
            raise ValueError(f"{self.files[name]}: {name} has dtype {dtype}, must be one of {', '.join(DTYPES)}")

    def _check_head(self, rows: int, width: int) -> None:
        """Checks that a tied model's head, if stored, equals its embedding. Needs torch, for bf16."""
        self._check_shape(HEAD, (rows, width))
        head, embedding = self._read(HEAD), self._read(self._named(self.format.embedding))
        for low, high in pieces(0, rows, 4 * width):
            if not head[low:high].equal(embedding[low:high]):
                raise ValueError(
                    f"{self.folder} has an {HEAD} that differs from its embedding, but {CONFIG} has"
                    " tie_word_embeddings=true (or this default): set tie_word_embeddings there"
                )

    def _named(self, theirs: str) -> str:
        """Name of a tensor in the files. A tied model may have its matrix only under the name of the head."""
        name = theirs if theirs == HEAD else self.prefix + theirs
        alone = theirs == self.format.embedding and self.tie == "tied" and name not in self.files
        return HEAD if alone and HEAD in self.files else name

    def _look(self, name: str) -> Any:
        """Tensor for its shape and dtype; does not need torch."""
        return self._slice(name, "np")

    def _read(self, name: str) -> Any:
        """Tensor with torch tensors as slices."""
        return self._slice(name, "pt")

    def _slice(self, name: str, framework: str) -> Any:
        try:
            return self._open(self.files[name], framework).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self.files[name]}: {error}") from error

    def _open(self, path: Path, framework: str = "np") -> Any:
        """Opens a safetensors file, memory-mapped; "pt" imports torch. Raises ValueError if it cannot be read."""
        if (path, framework) not in self._opened:
            try:
                refuse_pointer(path)
                self._opened[path, framework] = safe_open(path, framework=framework)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
        return self._opened[path, framework]

    def _find(self) -> dict[str, Path]:
        """Returns the file of each tensor. Never reads a pickle."""
        folder, path = self.folder, self.folder / WEIGHTS
        if path.is_file():  # before an index: `transformers` does not delete an old index when it saves one file
            return dict.fromkeys(self._open(path).keys(), path)
        if (folder / INDEX).is_file():
            weight_map = read_json(folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{folder / INDEX}: weight_map is missing")
            return {name: folder / str(file) for name, file in weight_map.items()}
        pickled = next(folder.glob("pytorch_model*.bin"), None)
        instead = f": {pickled} is a pickle, which is not read; save the model as safetensors" if pickled else ""
        raise ValueError(f"{path} is missing{instead}")


def pieces(start: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields consecutive ranges of rows in [start, stop), each of at most PIECE_BYTES."""
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for low in range(start, stop, step):
        yield low, min(low + step, stop)
