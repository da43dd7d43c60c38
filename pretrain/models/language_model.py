"""The matrix and a body of any family together. Not part of a family's file: it is the same for all of them."""

from collections.abc import Callable

from torch import Tensor

from ..vocab import VocabLoss, VocabParallelEmbedding
from ..vocab.lookup import LookupPlan


class LanguageModel:
    """vocab + body: tokens in, loss out."""

    def __init__(self, vocab: VocabParallelEmbedding, body: Callable[..., Tensor]) -> None:
        self.vocab = vocab
        self.body = body

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        starts_BT: Tensor | None = None,
        scale: float | None = None,
        plan: LookupPlan | None = None,
    ) -> VocabLoss:
        """Sum of the loss over this rank's targets.

        `starts_BT`: see `Body`. `scale`, for a training step, and `plan`: see `VocabParallelEmbedding`. Collectives:
        its and the engine's.
        """
        return self.vocab.loss(self.body(self.vocab.lookup(tokens_BT, plan), starts_BT), targets_BT, scale)
