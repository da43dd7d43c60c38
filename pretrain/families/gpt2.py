"""GPT-2: settings, tensor names in Hugging Face files, footprint.

Separate from the body (models/gpt2.py) because launchers read this without torch. Hugging Face stores GPT-2's
projections as Conv1D, with weights [in, out]; ours are [out, in].
"""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from .family import Activations, Family, HuggingFace, WeightMapping, check_positive, must_be, need

if TYPE_CHECKING:
    from torch import nn

GELUS = {"tanh": "tanh", "exact": "none"}  # our name to torch's
THEIR_GELUS = {
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_fast": "tanh",
    "gelu": "exact",
    "gelu_python": "exact",
}
NORMS = {"norm1": "ln_1", "norm2": "ln_2"}
PROJECTIONS = {
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


@dataclass
class GPT2Config:
    """Settings of a GPT-2."""

    family: str = "gpt2"  # model family
    layers: int = 12  # number of blocks
    width: int = 768  # D, width of the residual stream
    heads: int = 12  # attention heads, each of size width / heads
    context: int = 1024  # longest sequence in tokens; sets the number of position embeddings
    eps: float = 1e-5  # epsilon of the layer norms
    gelu: str = "tanh"  # tanh: the approximation that GPT-2 uses; exact: the exact GELU

    def __post_init__(self) -> None:
        check_positive(self, whole=("layers", "width", "heads", "context"), real=())
        if self.width % self.heads:
            raise ValueError(f"model.heads={self.heads} must divide model.width={self.width}")
        check_positive(self, whole=(), real=("eps",))
        if self.gelu not in GELUS:
            raise ValueError(f"model.gelu={self.gelu} must be one of {', '.join(GELUS)}")

    def body(self) -> "nn.Module":
        return resolve_name("pretrain.models.gpt2:Body")(self)

    def activations(self, checkpointing: str) -> Activations:
        kept, again = {
            # inputs of two norms (1, 1) and of four projections (1, 1, 1, 4), qkv (3), GELU's input (4)
            "none": (16, 0),
            "block": (1, 15),  # only its input
            "selective": (11, 7),  # its input and the outputs of matmuls (3, 1, 4, 1) and attention (1)
        }[checkpointing]
        D, sums = self.width, self.heads * (checkpointing != "block")
        gradients = 5 * D  # of the block's output and of GELU's
        formula = f"a block: N · (D · i · {kept} + 4 · heads)"
        return Activations(kept * D, again * D, gradients, sums, D, formula)


def model(config: dict[str, Any]) -> GPT2Config:
    """Converts a config.json to our settings."""
    layers, width, heads = need(config, "n_layer", "n_embd", "n_head")
    context = config.get("n_positions") or config.get("n_ctx") or 1024
    must_be(config, "n_inner", None, 4 * width)
    must_be(config, "scale_attn_weights", True)
    must_be(config, "scale_attn_by_inverse_layer_idx", False)
    must_be(config, "add_cross_attention", False)
    must_be(config, "activation_function", *THEIR_GELUS)
    (eps,) = need({"layer_norm_epsilon": 1e-5} | config, "layer_norm_epsilon", kinds=(int, float))
    return GPT2Config(
        layers=layers,
        width=width,
        heads=heads,
        context=context,
        eps=eps,
        gelu=THEIR_GELUS[config.get("activation_function", "gelu_new")],
    )


def settings(model: GPT2Config) -> dict[str, Any]:
    """Converts our settings to a config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": model.layers,
        "n_embd": model.width,
        "n_head": model.heads,
        "n_positions": model.context,
        "n_inner": None,
        "activation_function": {"tanh": "gelu_new", "exact": "gelu"}[model.gelu],
        "layer_norm_epsilon": model.eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def mappings(model: GPT2Config) -> list[WeightMapping]:
    D = model.width
    shapes = {"attention.qkv": (3 * D, D), "attention.out": (D, D), "mlp.up": (4 * D, D), "mlp.down": (D, 4 * D)}
    found = [WeightMapping("positions", {"wpe.weight": model.context}, D)]
    for i in range(model.layers):
        ours, theirs = f"blocks.{i}", f"h.{i}"
        for name, hf_name in NORMS.items():
            found += [
                WeightMapping(f"{ours}.{name}.{kind}", {f"{theirs}.{hf_name}.{kind}": D}) for kind in ("weight", "bias")
            ]
        for name, hf_name in PROJECTIONS.items():
            rows, columns = shapes[name]
            weight = {f"{theirs}.{hf_name}.weight": rows}
            found.append(WeightMapping(f"{ours}.{name}.weight", weight, columns, transposed=True))
            found.append(WeightMapping(f"{ours}.{name}.bias", {f"{theirs}.{hf_name}.bias": rows}))
    return found + [WeightMapping(f"norm.{kind}", {f"ln_f.{kind}": D}) for kind in ("weight", "bias")]


GPT2 = Family(
    GPT2Config,
    HuggingFace(
        model_types={"gpt2": "GPT-2"},
        prefix="transformer.",
        embedding="wte.weight",
        tied=True,
        buffers=(".attn.bias", ".attn.masked_bias"),
        model=model,
        settings=settings,
        mappings=mappings,
    ),
)
