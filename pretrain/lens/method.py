"""The states that a lens takes, and how it decodes them. Separate from lens.py: commands check it without torch."""

from dataclasses import dataclass

POINTS = ("attention", "mlp", "block")
INPUTS = ("positions", "embedding")
NORMS = ("full", "plain", "none")
DECODERS = ("none", "mlp", "block")
OUTPUT = "output"


@dataclass(frozen=True)
class Method:
    """The points at which hidden states are taken, and how they become guesses.

    points: in each block: the residual stream after `attention`, after `mlp`, and the output of the `block`; the last
    two are equal if nothing follows the MLP. input: `positions`, the state that enters the first block, or
    `embedding`, the tokens' rows alone; equal if the model adds no positions. norm: `full`, the model's final norm;
    `plain`, without its learned scale and bias; `none`. decoder: a state first passes the last `block`, or only its
    `mlp`, unless it comes from after that.
    """

    points: tuple[str, ...] = ("block",)
    input: str = "positions"  # the first row, and the reference of the divergences from the input
    norm: str = "full"
    decoder: str = "none"
    stride: int = 1  # take every n-th block; the output is always taken

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
        """Names of the rows, from the input to the model's output. Leaves out a row that must equal the output."""
        names = [self.input]
        for i in range(0, blocks, self.stride):
            names += [name_of(i, point) for point in POINTS if point in self.points]
        last, passed = blocks - 1, {"none": ["block"] if self.norm == "full" else [], "mlp": ["mlp", "block"]}
        gone = [name_of(last, point) for point in passed.get(self.decoder, POINTS)]
        return [name for name in names if name not in gone] + [OUTPUT]


def name_of(block: int, point: str) -> str:
    return f"block {block}" if point == "block" else f"block {block} {point}"


def layer_name(row: str) -> str:
    """The name of a row on pages, pictures and curves: "input" for what enters the first block."""
    return "input" if row in INPUTS else row
