"""Language model: the matrix and a body. Separate from the families because it is the same for all of them."""

from collections.abc import Callable

from torch import Tensor

from ..timeline import HEAD, Timeline
from ..vocab import VocabLoss, VocabParallelEmbedding
from ..vocab.lookup import LookupPlan


class LanguageModel:
    """Matrix and body together: tokens in, loss out."""

    def __init__(self, vocab: VocabParallelEmbedding, body: Callable[..., Tensor]) -> None:
        self.vocab = vocab
        self.body = body
        self.timeline = Timeline()  # the trainer marks the other parts of a step

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        starts_BT: Tensor | None = None,
        scale: float | None = None,
        plan: LookupPlan | None = None,
    ) -> VocabLoss:
        """Sum of the loss over this rank's targets. Every rank must pass the same number of tokens.

        starts_BT: see `Body`. scale (for a training step) and plan: see `VocabParallelEmbedding`. Collectives: the
        lookup's, the loss's and the engine's.
        """
        tokens = tokens_BT.numel()
        hidden_BTD = self.body(self.vocab.lookup(tokens_BT, plan, max_tokens_per_rank=tokens), starts_BT)
        self.timeline.mark(HEAD)
        return self.vocab.loss(hidden_BTD, targets_BT, scale, max_tokens_per_rank=tokens)
