"""Llama, Mistral, Qwen2, Qwen3: settings, tensor names in Hugging Face files, footprint.

Separate from the body (models/llama.py) because launchers read this without torch. The four differ in biases, norms and
defaults of config.json.
"""

from dataclasses import asdict, dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from .family import Activations, Family, HuggingFace, WeightMapping, check_positive, must_be, need

if TYPE_CHECKING:
    from torch import nn

BIASES = {"llama": ("none", "attention"), "mistral": ("none",), "qwen2": ("qkv",), "qwen3": ("none", "attention")}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass
class LlamaConfig:
    """Settings of a Llama, Mistral or Qwen.

    rope_factor, rope_low, rope_high and rope_original are the frequency scaling of Llama 3.1. Frequencies with fewer
    than rope_low periods in rope_original positions are divided by rope_factor. Frequencies with more than rope_high
    periods are kept. The rest are interpolated.
    """

    family: str = "llama"  # model family
    layers: int = 16  # number of blocks
    width: int = 2048  # D, width of the residual stream
    heads: int = 32  # H query heads
    kv_heads: int = 8  # K key/value heads, each shared by H / K query heads
    head_size: int | None = None  # d, size of a head; null: D / H
    inner: int = 8192  # F, inner width of the MLP
    context: int = 8192  # longest sequence in tokens
    eps: float = 1e-5  # epsilon of the RMS norms
    rope_theta: float = 500_000.0  # base of the rotary frequencies
    rope_factor: float = 1.0  # divisor of the low rotary frequencies (Llama 3.1 scaling); 1: off
    rope_low: float = 1.0  # frequencies with fewer periods in rope_original positions are divided
    rope_high: float = 4.0  # frequencies with more periods in rope_original positions are kept
    rope_original: int = 8192  # positions over which the periods are counted
    qk_norm: bool = False  # RMS norm of queries and keys, per head (Qwen3)
    bias: str = "none"  # none; qkv: of the qkv projection (Qwen2); attention: of qkv and of the output projection

    def __post_init__(self) -> None:
        check_positive(
            self,
            whole=("layers", "width", "heads", "kv_heads", "inner", "context", "rope_original"),
            real=("eps", "rope_theta", "rope_factor", "rope_low", "rope_high"),
        )
        if self.rope_low >= self.rope_high:
            raise ValueError(f"model.rope_low={self.rope_low} must be below model.rope_high={self.rope_high}")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}")
        if self.head_size is None and self.width % self.heads:
            raise ValueError(f"model.heads={self.heads} must divide model.width={self.width}, or give model.head_size")
        if self.size < 2 or self.size % 2:
            raise ValueError(f"model.head_size={self.size} must be even: rotary positions rotate pairs of dims")
        if self.bias not in ("none", "qkv", "attention"):
            raise ValueError(f"model.bias={self.bias} must be none, qkv or attention")

    @property
    def size(self) -> int:
        """Size d of a head."""
        return self.head_size if self.head_size is not None else self.width // self.heads

    def body(self) -> "nn.Module":
        return resolve_name("pretrain.models.llama:Body")(self)

    def activations(self, checkpointing: str) -> Activations:
        """Activation memory on a GPU, where a norm keeps only its input."""
        D, F, queries, keys = self.width, self.inner, self.heads * self.size, self.kv_heads * self.size
        qkv, turned = queries + 2 * keys, queries + keys
        # inputs of two norms and two projections; queries and keys before and after rotation; four tensors of the MLP
        everything = 4 * D + qkv + turned + queries + 4 * F
        kept, again, formula = {
            "none": (everything, 0, "4 · D + 3 · (queries + keys) + 4 · F"),
            "block": (D, everything - D, "D"),
            "selective": (
                3 * D + qkv + queries + 2 * F,
                3 * D + turned + 2 * F,
                "3 · D + 2 · (queries + keys) + 2 · F",
            ),
        }[checkpointing]
        sums = (self.heads + (self.heads + self.kv_heads) * self.qk_norm) * (checkpointing != "block")
        formula = f"a block: N · (i · ({formula}) + 4 · heads)"
        return Activations(kept, again, D + 2 * F, sums, queries, formula)


def model(config: dict[str, Any]) -> LlamaConfig:
    """Converts a config.json to our settings."""
    kind = config["model_type"]
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    layers, width, heads, inner, context = need(config, *names)
    need(config, *(key for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None))
    must_be(config, "hidden_act", "silu")
    must_be(config, "mlp_bias", False)
    window = config.get("sliding_window", 4096) if kind == "mistral" else None  # the default of Mistral's config
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
    """Reads rope_theta and rope_scaling of transformers 4, and rope_parameters of transformers 5."""
    # Takes one of them completely, as transformers 5 does.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
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
    """Converts our settings to a config.json of the simplest model_type that supports them."""
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
        "rope_parameters": rope,  # read by transformers 5; transformers 4 reads the next two
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

        def add(
            name: str, hf_rows: dict[str, int], columns: int | None = None, ours: str = ours, theirs: str = theirs
        ) -> None:
            rows_of = {f"{theirs}.{hf_name}": rows for hf_name, rows in hf_rows.items()}
            found.append(WeightMapping(f"{ours}.{name}", rows_of, columns))

        add("norm1.weight", {"input_layernorm.weight": D})
        add("attention.qkv.weight", {f"self_attn.{part}.weight": rows for part, rows in parts.items()}, D)
        if model.bias != "none":
            add("attention.qkv.bias", {f"self_attn.{part}.bias": rows for part, rows in parts.items()})
        add("attention.out.weight", {"self_attn.o_proj.weight": D}, queries)
        if model.bias == "attention":
            add("attention.out.bias", {"self_attn.o_proj.bias": D})
        if model.qk_norm:
            add("attention.query_norm.weight", {"self_attn.q_norm.weight": model.size})
            add("attention.key_norm.weight", {"self_attn.k_norm.weight": model.size})
        add("norm2.weight", {"post_attention_layernorm.weight": D})
        for part, rows, columns in (("gate", F, D), ("up", F, D), ("down", D, F)):
            add(f"mlp.{part}.weight", {f"mlp.{part}_proj.weight": rows}, columns)
    return [*found, WeightMapping("norm.weight", {"norm.weight": D})]


def missing(model: LlamaConfig) -> dict[str, int]:
    """Biases of the attention output: Qwen3 has one whenever it has a bias of qkv."""
    if not model.qk_norm or model.bias != "qkv":
        return {}
    return {f"layers.{i}.self_attn.o_proj.bias": model.width for i in range(model.layers)}


LLAMA = Family(
    LlamaConfig,
    HuggingFace(
        model_types={"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"},
        prefix="model.",
        embedding="embed_tokens.weight",
        tied=False,
        buffers=(".rotary_emb.inv_freq",),
        model=model,
        settings=settings,
        mappings=mappings,
        missing=missing,
    ),
    without_weights=frozenset({"context"}),
    explicit=lambda model: asdict(model) | {"head_size": model.size},
)
