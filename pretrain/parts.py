"""Parts that step together on one rank. Not part of the trainer, because hooks are built from them as well."""

from dataclasses import dataclass

from .engine import Engine
from .mesh import Mesh
from .models.language_model import LanguageModel
from .optim import VocabOptimizer


@dataclass(frozen=True)
class ModelParts:
    """The model of this rank and its optimizers."""

    engine: Engine  # steps the body
    model: LanguageModel
    vocab_optimizer: VocabOptimizer  # steps this rank's rows of the matrix
    mesh: Mesh
