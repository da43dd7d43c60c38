"""Saves and loads small models of `transformers` with random weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from data_prep.tokenizer_spec import TokenizerSpec
from pretrain.interop.export import _write
from pretrain.interop.tokenizer import to_hf
from tests.data_prep.commands import small_spec

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

VOCAB = small_spec().vocab_size  # 260: not divisible by every number of ranks, even when padded
GPT2 = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 48}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXACT_GELU = {"activation_function": "gelu", "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2 tied": ("GPT2", GPT2),
    "gpt2 untied, exact gelu": ("GPT2", GPT2 | EXACT_GELU),
    "llama tied": ("Llama", LLAMA | {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama untied, biases": ("Llama", LLAMA | {"attention_bias": True, "rms_norm_eps": 1e-3}),
    "mistral untied": ("Mistral", LLAMA | {"sliding_window": None}),
    "qwen2 tied": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen3 untied": ("Qwen3", LLAMA | {"head_dim": 10}),
}


def save(
    folder: Path, kind: str, *, bare: bool = False, seed: int = 0, spec: TokenizerSpec | None = None, **options: Any
) -> Path:
    """Saves a model of this kind with a byte tokenizer. bare: without a head and without prefix in the names."""
    (name, settings), spec = KINDS[kind], spec or small_spec()
    settings, end = settings | {"vocab_size": spec.vocab_size}, spec.end_of_document
    config = getattr(transformers, f"{name}Config")(**settings | {"bos_token_id": end, "eos_token_id": end})
    model = getattr(transformers, name + ("Model" if bare else "LMHeadModel" if name == "GPT2" else "ForCausalLM"))(
        config
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)
    model.save_pretrained(folder, **options)
    save_tokenizer(folder, spec)
    return folder


def save_tokenizer(folder: Path, spec: TokenizerSpec) -> None:
    for name, content in to_hf(spec, 48).items():
        _write(folder / name, content)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Loads a model as a user would, for inference."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(dtype).eval()


@torch.no_grad()
def logits(folder: Path, ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
    with exact_norms():
        return load(folder, dtype)(ids_BT).logits


@contextmanager
def exact_norms() -> Iterator[None]:
    """Replaces RMS norms, which transformers always computes in fp32."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    models = transformers.models
    norms = [
        models.llama.modeling_llama.LlamaRMSNorm,
        models.mistral.modeling_mistral.MistralRMSNorm,
        models.qwen2.modeling_qwen2.Qwen2RMSNorm,
        models.qwen3.modeling_qwen3.Qwen3RMSNorm,
    ]
    patches = [patch.object(norm, "forward", forward) for norm in norms]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Tensors by name without prefix; without the head of a tied model."""
    from safetensors.torch import load_file

    found = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    return {name.removeprefix("transformer.").removeprefix("model."): tensor for name, tensor in found.items()}
