"""Parts that step together on one rank. Apart from the trainer because hooks are built from it, too."""

from dataclasses import dataclass

from .engine import Engine
from .mesh import Mesh
from .models.language_model import LanguageModel
from .optim import VocabOptimizer


@dataclass(frozen=True)
class ModelParts:
    """The model of this rank and what changes it."""

    engine: Engine  # steps the body
    model: LanguageModel
    vocab_optimizer: VocabOptimizer  # steps this rank's rows of the matrix
    mesh: Mesh
