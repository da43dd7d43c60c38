"""Llama, Mistral, Qwen2 and Qwen3 as Hugging Face keeps them. They differ in biases and norms, and in what is said."""

from typing import Any

from ..models.llama import LlamaConfig
from .mappings import Family, WeightMapping, must_be, need

BIASES = {"llama": ("none", "attention"), "mistral": ("none",), "qwen2": ("qkv",), "qwen3": ("none", "attention")}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def model(config: dict[str, Any]) -> LlamaConfig:
    kind = config["model_type"]
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    layers, width, heads, inner, context = need(config, *names)
    need(config, *(key for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None))
    must_be(config, "hidden_act", "silu")
    must_be(config, "mlp_bias", False)
    window = config.get("sliding_window", 4096) if kind == "mistral" else None  # what its absence means there
    if window is not None and window < context:
        raise ValueError(f"sliding_window={window} must be null, or at least max_position_embeddings={context}")
    must_be(config, "use_sliding_window", False)
    for layer in config.get("layer_types") or []:
        must_be({"layer_types": layer}, "layer_types", "full_attention")
    (eps,) = need({"rms_norm_eps": 1e-6} | config, "rms_norm_eps", kinds=(int, float))
    bias = BIASES[kind][-1] if config.get("attention_bias", kind == "qwen2") else BIASES[kind][0]
    return LlamaConfig(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=_head_size(config, width, heads),
        inner=inner,
        context=context,
        eps=eps,
        qk_norm=kind == "qwen3",
        bias=bias,
        **_rope(config),
    )


def _head_size(config: dict[str, Any], width: int, heads: int) -> int | None:
    size = config.get("head_dim") or (128 if config["model_type"] == "qwen3" else None)
    return None if size is None or size * heads == width else size


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Of files of transformers 4, rope_theta and rope_scaling, and of transformers 5, rope_parameters."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # whole, as transformers 5 takes them
    if config.get("original_max_position_embeddings") is not None:
        rope = rope | {"original_max_position_embeddings": config["original_max_position_embeddings"]}
    given: dict[str, Any] = {"rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)}
    must_be(rope | config, "partial_rotary_factor", 1.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    must_be({"rope_type": kind}, "rope_type", "default", "llama3")
    if kind == "default":
        return given
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, original = need(rope, *names, kinds=(int, float))
    return given | {
        "rope_factor": float(factor),
        "rope_low": float(low),
        "rope_high": float(high),
        "rope_original": int(original),
    }


def settings(model: LlamaConfig) -> dict[str, Any]:
    """Of the plainest kind that is this model."""
    kind = "qwen3" if model.qk_norm else "qwen2" if model.bias == "qkv" else "llama"
    if kind == "llama" and model.width % model.heads:
        raise ValueError(f"model.heads={model.heads} must divide model.width={model.width} for transformers' Llama")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_factor != 1:
        rope |= {
            "rope_type": "llama3",
            "factor": model.rope_factor,
            "low_freq_factor": model.rope_low,
            "high_freq_factor": model.rope_high,
            "original_max_position_embeddings": model.rope_original,
        }
    given = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.size,
        "intermediate_size": model.inner,
        "max_position_embeddings": model.context,
        "hidden_act": "silu",
        "rms_norm_eps": model.eps,
        "rope_parameters": rope,  # transformers 5 reads this, 4 what follows
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_factor == 1 else rope,
    }
    if kind == "qwen2":
        return given | {"use_sliding_window": False}
    return given | {"attention_bias": model.bias != "none", "attention_dropout": 0.0}


def mappings(model: LlamaConfig) -> list[WeightMapping]:
    D, F, queries, keys = model.width, model.inner, model.heads * model.size, model.kv_heads * model.size
    parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    found = []
    for i in range(model.layers):
        ours, theirs = f"blocks.{i}", f"layers.{i}"

        def add(name: str, others: dict[str, int], ours: str = ours, theirs: str = theirs) -> None:
            found.append(WeightMapping(f"{ours}.{name}", {f"{theirs}.{other}": rows for other, rows in others.items()}))

        add("norm1.weight", {"input_layernorm.weight": D})
        add("attention.qkv.weight", {f"self_attn.{part}.weight": rows for part, rows in parts.items()})
        if model.bias != "none":
            add("attention.qkv.bias", {f"self_attn.{part}.bias": rows for part, rows in parts.items()})
        add("attention.out.weight", {"self_attn.o_proj.weight": D})
        if model.bias == "attention":
            add("attention.out.bias", {"self_attn.o_proj.bias": D})
        if model.qk_norm:
            add("attention.query_norm.weight", {"self_attn.q_norm.weight": model.size})
            add("attention.key_norm.weight", {"self_attn.k_norm.weight": model.size})
        add("norm2.weight", {"post_attention_layernorm.weight": D})
        for part, rows in (("gate", F), ("up", F), ("down", D)):
            add(f"mlp.{part}.weight", {f"mlp.{part}_proj.weight": rows})
    return [*found, WeightMapping("norm.weight", {"norm.weight": D})]


def missing(model: LlamaConfig) -> dict[str, int]:
    """Qwen3 has a bias after attention if it has one before it."""
    if not model.qk_norm or model.bias != "qkv":
        return {}
    return {f"layers.{i}.self_attn.o_proj.bias": model.width for i in range(model.layers)}


LLAMA = Family(
    prefix="model.",
    embedding="embed_tokens.weight",
    tied=False,
    buffers=(".rotary_emb.inv_freq",),
    model=model,
    settings=settings,
    mappings=mappings,
    missing=missing,
)
