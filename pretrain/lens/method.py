"""Which states a lens takes, and how it decodes them. Apart from lens.py because commands check it without torch."""

from dataclasses import dataclass

POINTS = ("attention", "mlp", "block")
INPUTS = ("positions", "embedding")
NORMS = ("full", "plain", "none")
DECODERS = ("none", "mlp", "block")
OUTPUT = "output"


@dataclass(frozen=True)
class Method:
    """The points at which hidden states are taken, and how they become guesses.

    points: of each block: the residual stream after `attention`, after `mlp`, and the `block`'s output, which is the
    same as after its MLP where nothing follows that. input: the first row, and the reference of the divergences from
    the input: `positions`, what enters the first block, or `embedding`, the tokens' rows alone; the same where no
    positions are added. norm: `full`, the model's final norm; `plain`, without its learned scale and bias; `none`.
    decoder: a state first passes the last `block`, or its `mlp` alone, where it has not yet. stride: of the blocks;
    the last row, the model's own output, is always there.
    """

    points: tuple[str, ...] = ("block",)
    input: str = "positions"
    norm: str = "full"
    decoder: str = "none"
    stride: int = 1

    def __post_init__(self) -> None:
        for key, given, known in (
            *(("points", point, POINTS) for point in self.points or ("",)),
            ("input", self.input, INPUTS),
            ("norm", self.norm, NORMS),
            ("decoder", self.decoder, DECODERS),
        ):
            if given not in known:
                raise ValueError(f"{key}={given} must be one of {', '.join(known)}")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be at least 1")

    def rows(self, blocks: int) -> list[str]:
        """The rows' names, the input first, the model's output last; what must equal the output is left out."""
        names = [self.input]
        for i in range(0, blocks, self.stride):
            names += [name_of(i, point) for point in POINTS if point in self.points]
        last, passed = blocks - 1, {"none": ["block"] if self.norm == "full" else [], "mlp": ["mlp", "block"]}
        gone = [name_of(last, point) for point in passed.get(self.decoder, POINTS)]
        return [name for name in names if name not in gone] + [OUTPUT]


def name_of(block: int, point: str) -> str:
    return f"block {block}" if point == "block" else f"block {block} {point}"
