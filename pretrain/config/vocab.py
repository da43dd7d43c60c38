"""Settings of the vocabulary and its matrix. Group vocab. Imports nothing of ours: pretrain.vocab imports it."""

import math
from dataclasses import dataclass
from typing import Any

LARGEST_VOCABULARY = 2**24  # the loss sends ids as fp32, which holds them exactly up to here


@dataclass
class VocabConfig:
    """The vocabulary and how its matrix is sharded, tied and used.

    >>> VocabConfig(size=1000, softcap=30.0).multiple
    128
    >>> VocabConfig(softcap=-1.0)
    Traceback (most recent call last):
    ValueError: vocab.softcap=-1.0 must be positive (or null: no cap)
    """

    size: int | None = None  # tokens in the vocabulary; null: as many as the tokenizer has
    multiple: int = 128  # the matrix is padded to a multiple of this number of rows
    parallel: str = "auto"  # ranks that share one copy of the matrix; auto: chosen by estimated step time
    tie: str = "tied"  # tied: one matrix for input and output; untied: two from the start
    #: step after which a tied matrix becomes two copies, with copies of its optimizer state; null: never
    untie_at: int | None = None
    embed_scale: float = 1.0  # factor on the embeddings that the lookup returns (Gemma: sqrt(width))
    #: factor on the gradient from the lookup; 0: the matrix is trained through the output only
    input_grad_scale: float = 1.0
    z_loss: float = 0.0  # weight of the squared log-sum-exp of the logits in the loss; 0: off
    label_smoothing: float = 0.0  # probability moved from the target to all tokens, in equal parts; 0: off
    softcap: float | None = None  # logits are capped by softcap·tanh(logit / softcap); null: no cap
    #: MiB of temporary memory of the loss, besides the gradient of its rows; it sets the number of tokens per chunk.
    #: null: 64 on a CPU, 896 on a GPU, or a quarter of that gradient if that is more. More memory gains little once a
    #: chunk has 512 tokens (on a GPU: 2,048)
    head_memory_mib: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and not 1 <= self.size <= LARGEST_VOCABULARY:
            raise ValueError(f"vocab.size={self.size} must be in [1, {LARGEST_VOCABULARY}] (or null: the tokenizer's)")
        if self.multiple < 1:
            raise ValueError(f"vocab.multiple={self.multiple} must be at least 1")
        if self.parallel != "auto" and not (self.parallel.isdecimal() and int(self.parallel) >= 1):
            raise ValueError(f"vocab.parallel={self.parallel} must be auto or a positive number of ranks")
        if self.tie not in ("tied", "untied"):
            raise ValueError(f"vocab.tie={self.tie} must be tied or untied")
        if self.untie_at is not None and self.untie_at < 1:
            raise ValueError(f"vocab.untie_at={self.untie_at} must be at least 1 (or null: never)")
        if self.untie_at is not None and self.tie != "tied":
            raise ValueError(f"vocab.untie_at={self.untie_at} needs vocab.tie=tied: untied matrices are already two")
        if not 0 < self.embed_scale < math.inf:
            raise ValueError(f"vocab.embed_scale={self.embed_scale} must be positive")
        if not 0 <= self.input_grad_scale < math.inf:
            raise ValueError(f"vocab.input_grad_scale={self.input_grad_scale} must be a number of at least 0")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"vocab.z_loss={self.z_loss} must be a number of at least 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"vocab.label_smoothing={self.label_smoothing} must be in [0, 1)")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"vocab.softcap={self.softcap} must be positive (or null: no cap)")
        if self.head_memory_mib is not None and self.head_memory_mib < 1:
            raise ValueError(f"vocab.head_memory_mib={self.head_memory_mib} must be at least 1 (or null: by device)")

    @property
    def matrices(self) -> int:
        """Largest number of matrices during the run: 1 or 2."""
        return 1 if self.untied_at(None) is None else 2

    def check_world(self, world: int) -> None:
        """Raises ValueError if `world` ranks cannot be divided into groups of `parallel` ranks."""
        if self.parallel != "auto" and world % int(self.parallel):
            raise ValueError(f"vocab.parallel={self.parallel} must divide the number of ranks, {world}")

    def check_steps(self, steps: int) -> None:
        """Raises ValueError if `untie_at` is not below `steps`, the length of the training."""
        if self.untie_at is not None and self.untie_at >= steps:
            raise ValueError(f"vocab.untie_at={self.untie_at} must be below train.steps={steps}")

    def split_otherwise(self, saved: dict[str, Any], step: int) -> tuple[str, str] | None:
        """Returns the saved and the current setting if they disagree on the matrices at `step`; None if they agree.

        A future untying may move to another step. A past one cannot be undone.
        """
        was = VocabConfig(untie_at=saved["untie_at"])
        if self.tie != "tied" or self.untied_at(step) == was.untied_at(step):
            return None
        before, now = ("null" if at is None else at for at in (was.untie_at, self.untie_at))
        return f"vocab.untie_at={before} at step {step}", f"{now}"

    def untied_at(self, step: int | None) -> int | None:
        """Step after which the matrices of a checkpoint of `step` became two: 0 if untied from the start, None if
        still tied. step=None: at the end of the training.
        """
        if self.tie == "untied":
            return 0
        return self.untie_at if self.untie_at is not None and (step is None or self.untie_at < step) else None
