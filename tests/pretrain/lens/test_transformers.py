"""The lens on an imported model matches the hidden states of `transformers`, in float64."""

from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pretrain.interop.folder import HFModel
from pretrain.interop.weights import load_model
from pretrain.lens.lens import run_lens
from pretrain.lens.method import Method
from tests.pretrain.lens.test_lens import measured
from tests.ranks import run_ranks

VOCAB, WIDTH, LAYERS, LENGTH, K = 151, 24, 3, 12, 4
FAMILIES = ("gpt2", "llama")
METHODS = [
    Method(norm=norm, input=input) for norm, input in product(("full", "plain", "none"), ("positions", "embedding"))
]
NEAR = {"rtol": 1e-9, "atol": 1e-9}


def saved(folder: Path, family: str, tied: bool) -> nn.Module:
    """A model with random weights, none at its initial 0 or 1."""
    import transformers

    torch.manual_seed(3)
    common = {"vocab_size": VOCAB, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=3, n_positions=16, **common)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            **common,
        )
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / (2 if parameter.dim() == 1 else WIDTH**0.5))
    model.save_pretrained(folder)
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = partial(accurate_norm, module)
    return model.double().eval()


def accurate_norm(module: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm in the input's dtype: the one of transformers rounds to fp32."""
    return x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight


def tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCAB, (1, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


@torch.no_grad()
def dense(model: nn.Module, family: str, method: Method) -> dict[str, Tensor]:
    ids, targets = (part[0] for part in tokens())
    inner = model.transformer if family == "gpt2" else model.model
    norm = inner.ln_f if family == "gpt2" else inner.norm
    last = []
    handle = norm.register_forward_pre_hook(lambda module, args: last.append(args[0][0]))
    out = model(ids[None], output_hidden_states=True)
    handle.remove()
    states = [state[0] for state in out.hidden_states[:-1]] + last  # the last state of transformers is normed
    if method.input == "embedding":
        states[0] = model.get_input_embeddings()(ids)
    if method.norm == "full":
        rows = [norm(state) for state in states]
    elif method.norm == "none":
        rows = [*states, norm(states[-1])]
    else:
        centre = [state - state.mean(-1, keepdim=True) if family == "gpt2" else state for state in states]
        eps = model.config.layer_norm_epsilon if family == "gpt2" else model.config.rms_norm_eps
        rows = [x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in centre] + [norm(states[-1])]
    logits = torch.stack([model.lm_head(row) for row in rows])
    assert_close(logits[-1], out.logits[0], **NEAR)
    p = logits.log_softmax(-1)
    order = logits.argsort(dim=-1, descending=True)
    places = order.argsort(-1) + 1
    top = order[..., 0]

    def of(values: Tensor, at: Tensor) -> Tensor:
        return values.gather(-1, at.expand(len(values), -1)[..., None])[..., 0]

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    return {
        "top": order[..., :K],
        "probabilities": p.gather(-1, order[..., :K]).exp(),
        "rank of final": of(places, top[-1]),
        "rank of token": of(places, ids),
        "kl from final": kl(p[-1:], p),
        "kl to final": kl(p, p[-1:]),
        "kl from input": kl(p[:1], p),
        "kl to input": kl(p, p[:1]),
        "entropy": -(p.exp() * p).sum(-1),
        "losses": -of(p, targets),
        "right": top[-1] == targets,
    }


def lens_on_rank(rank, world, folders):
    results = {}
    for name, folder in folders.items():
        model = load_model(HFModel(folder), torch.device("cpu"), torch.float64)
        for method in METHODS:
            found = run_lens(model.vocab, model.body, model.body, *tokens(), method, k=K, memory_mib=0.05)
            results[name, method] = measured(found)
    return results


@pytest.mark.parametrize("world", [1, 2, 4])
def test_views_match_for_every_norm(world, tmp_path):
    """Compares GPT-2 and Llama, tied and untied."""
    names = list(product(FAMILIES, (True, False)))
    models = {(family, tied): saved(tmp_path / f"{family}-{tied}", family, tied) for family, tied in names}
    results = run_ranks(world, lens_on_rank, {(f, t): tmp_path / f"{f}-{t}" for f, t in names}, timeout=120)
    for name, model in models.items():
        for method in METHODS:
            truth = dense(model, name[0], method)
            for rank in range(world):
                for view, value in truth.items():
                    note = {"msg": lambda text, at=(rank, name, method, view): f"{at}: {text}"}
                    assert_close(results[rank][name, method][view], value, **NEAR, **note)
