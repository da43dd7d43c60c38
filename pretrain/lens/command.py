"""Settings of the lens command. Separate from the command because modules that need torch read them, too."""

from dataclasses import dataclass, field
from pathlib import Path

from ..config.ema import check_choice
from .examples import EXAMPLES
from .method import Method

MOST_GUESSES = 100  # the page holds all of them


@dataclass
class LensConfig:
    """Settings of `python -m pretrain.lens`."""

    run: str = ""  # folder of the run
    step: int | None = None  # step of the checkpoint; null: the newest one
    weights: str = "last"  # of a run: last: the weights of the step; ema: their running average, see ema.decay
    hf: str = ""  # folder of a Hugging Face model, instead of run
    text: str = ""  # the prompt; read after <|endoftext|>, or after bos of a Hugging Face model
    file: str = ""  # a file with the prompt, instead of text
    example: str = ""  # a built-in prompt, instead of text: rare_word, repetition or commas
    out: str = "lens"  # folder for the pictures and the page
    window: str | None = None  # positions to show, START:STOP; null: all
    only: str = ""  # show only positions whose token has this text; empty: all
    #: states to show of each block, any of attention, mlp and block: after its attention, after its MLP, its output
    points: list[str] = field(default_factory=lambda: ["block"])
    input: str = "positions"  # first row: positions, the input of the first block; embedding, the tokens' rows alone
    norm: str = "full"  # final norm: full; plain, without its learned scale and bias; none
    decoder: str = "none"  # none; block: a state first passes the last block; mlp: only that block's MLP
    stride: int = 1  # show every n-th block; the output is always shown
    guesses: int = 5  # most likely tokens kept per cell, at most 100
    memory_mib: int = 256  # memory for logits per rank, MiB

    def __post_init__(self) -> None:
        if bool(self.run) == bool(self.hf):
            raise ValueError("give one of run=, the folder of a run, and hf=, the folder of a Hugging Face model")
        if self.hf and self.step is not None:
            raise ValueError(f"step={self.step} must be null with hf={self.hf}, which has no steps")
        check_choice(self.weights)
        if self.hf and self.weights != "last":
            raise ValueError(f"weights={self.weights} must be last with hf={self.hf}, which has no running average")
        if sum(map(bool, (self.text, self.file, self.example))) != 1:
            raise ValueError("give one of text=, file= and example=: the prompt")
        if self.example and self.example not in EXAMPLES:
            raise ValueError(f"example={self.example} must be one of {', '.join(EXAMPLES)}")
        if not 1 <= self.guesses <= MOST_GUESSES:
            raise ValueError(f"guesses={self.guesses} must be in [1, {MOST_GUESSES}]")
        if not self.out or (Path(self.out).exists() and not Path(self.out).is_dir()):
            raise ValueError(f"out={self.out} must be a folder; it may be new")
        if self.memory_mib < 1:
            raise ValueError(f"memory_mib={self.memory_mib} must be at least 1")
        self.method()

    def method(self) -> Method:
        return Method(tuple(self.points), self.input, self.norm, self.decoder, self.stride)
