"""GPT-2 as Hugging Face keeps it: its projections are Conv1D, whose weights are [in, out], ours [out, in]."""

from typing import Any

from ..models.gpt2 import GPT2Config
from .mappings import Family, WeightMapping, must_be, need

GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "exact", "gelu_python": "exact"}
NORMS = {"norm1": "ln_1", "norm2": "ln_2"}
PROJECTIONS = {
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def model(config: dict[str, Any]) -> GPT2Config:
    layers, width, heads = need(config, "n_layer", "n_embd", "n_head")
    context = config.get("n_positions") or config.get("n_ctx") or 1024
    must_be(config, "n_inner", None, 4 * width)
    must_be(config, "scale_attn_weights", True)
    must_be(config, "scale_attn_by_inverse_layer_idx", False)
    must_be(config, "add_cross_attention", False)
    must_be(config, "activation_function", *GELUS)
    (eps,) = need({"layer_norm_epsilon": 1e-5} | config, "layer_norm_epsilon", kinds=(int, float))
    return GPT2Config(
        layers=layers,
        width=width,
        heads=heads,
        context=context,
        eps=eps,
        gelu=GELUS[config.get("activation_function", "gelu_new")],
    )


def settings(model: GPT2Config) -> dict[str, Any]:
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
    rows = {"attention.qkv": 3 * D, "attention.out": D, "mlp.up": 4 * D, "mlp.down": D}
    found = [WeightMapping("positions", {"wpe.weight": model.context})]
    for i in range(model.layers):
        ours, theirs = f"blocks.{i}", f"h.{i}"
        for name, other in NORMS.items():
            found += [
                WeightMapping(f"{ours}.{name}.{kind}", {f"{theirs}.{other}.{kind}": D}) for kind in ("weight", "bias")
            ]
        for name, other in PROJECTIONS.items():
            weight = {f"{theirs}.{other}.weight": rows[name]}
            found.append(WeightMapping(f"{ours}.{name}.weight", weight, transposed=True))
            found.append(WeightMapping(f"{ours}.{name}.bias", {f"{theirs}.{other}.bias": rows[name]}))
    return found + [WeightMapping(f"norm.{kind}", {f"ln_f.{kind}": D}) for kind in ("weight", "bias")]


GPT2 = Family(
    prefix="transformer.",
    embedding="wte.weight",
    tied=True,
    buffers=(".attn.bias", ".attn.masked_bias"),
    model=model,
    settings=settings,
    mappings=mappings,
    missing=lambda model: {},
)
