"""The logit lens on a split matrix: what each layer would guess if it were the last.

nostalgebraist, "interpreting GPT: the logit lens", 2020; decoders that also run the last block or MLP are from the
same author's transformer-utils. B sequences, T positions, N of them shown, R rows (input, layers, output), D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..vocab import VocabParallelEmbedding
from ..vocab.readout import Reading, Readout
from .method import OUTPUT, Method, name_of

FINAL, TOKEN, NEXT = range(3)  # ids whose logits and ranks are read: the output's guess, the token, the next token
FROM_OUTPUT, FROM_INPUT = range(2)  # references of the divergences


class Recorder:
    """Records the hidden states of one call of the body in `rows`: name to [B, N, D], ready for the matrix.

    A context manager. It sets hooks on `body`, its `blocks`, their `attention` and `mlp`, and its final `norm`. States
    are decoded just before that norm runs, because then an engine has gathered the norm's weights. `window`: the
    positions to keep.
    """

    def __init__(self, body: nn.Module, method: Method, window: slice) -> None:
        self.body, self.method, self.window = body, method, window
        self.blocks: list[Any] = list(body.blocks)  # type: ignore[arg-type]
        self.names = method.rows(len(self.blocks))
        self.rows: dict[str, Tensor] = {}

    def __enter__(self) -> "Recorder":
        self._streams: dict[str, Tensor] = {}
        self._recording = True
        self._handles = [self.body.register_forward_pre_hook(self._enters)]
        for i, block in enumerate(self.blocks):
            self._handles.append(block.register_forward_pre_hook(partial(self._enters_block, i), with_kwargs=True))
            self._handles.append(block.register_forward_hook(partial(self._leaves, name_of(i, "block"), False)))
            for part in {"attention", "mlp"} if {"attention", "mlp"} & set(self.method.points) else ():
                hook = partial(self._leaves, name_of(i, part), True)
                self._handles.append(getattr(block, part).register_forward_hook(hook))
        norm: nn.Module = self.body.norm  # type: ignore[assignment]
        self._handles.append(norm.register_forward_pre_hook(self._decode))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def taken(self) -> Tensor:
        """Returns all rows, [R, B · N, D], and forgets them."""
        rows, self.rows = self.rows, {}
        return torch.stack([rows[name] for name in self.names]).flatten(1, 2)

    def _enters(self, body: nn.Module, args: tuple[Any, ...]) -> None:
        self._keep("embedding", args[0])

    def _enters_block(self, i: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._recording:
            return
        if i == 0:
            self._keep("positions", args[0])
        self._stream, self._others = args[0], (args[1:], kwargs)

    def _leaves(self, name: str, adds: bool, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Records the residual stream after a part of a block; `adds`: its output is added to the stream."""
        if self._recording:
            self._stream = self._stream + output if adds else output
            self._keep(name, self._stream)

    def _keep(self, name: str, hidden_BTD: Tensor) -> None:
        if name in self.names:
            self._streams[name] = hidden_BTD

    def _decode(self, norm: nn.Module, args: tuple[Tensor]) -> None:
        if not self._recording:
            return
        self._recording = False  # what decoders run is not part of the model's own pass
        for name in self.names[:-1]:
            self.rows[name] = self._normed(norm, self._decoded(self._streams.pop(name))[:, self.window])
        self.rows[OUTPUT] = norm.forward(args[0][:, self.window])

    def _decoded(self, hidden_BTD: Tensor) -> Tensor:
        last, (args, kwargs) = self.blocks[-1], self._others
        if self.method.decoder == "none":
            return hidden_BTD
        if self.method.decoder == "block":
            return last(hidden_BTD, *args, **kwargs)
        silent = last.attention.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        try:
            return last(hidden_BTD, *args, **kwargs)
        finally:
            silent.remove()

    def _normed(self, norm: nn.Module, hidden_BND: Tensor) -> Tensor:
        if self.method.norm == "none":
            return hidden_BND
        if self.method.norm == "full":
            return norm.forward(hidden_BND)
        unlearned = {
            name: torch.ones_like(parameter) if name == "weight" else torch.zeros_like(parameter)
            for name, parameter in norm.named_parameters()
        }
        return functional_call(norm, unlearned, (hidden_BND,))


@dataclass(frozen=True)
class LensResult:
    """Measurements at N positions, over all sequences.

    `rows`: R names, the input first, the model's output last. `reading`: [R, N, ...]. Its ids are, in this order, the
    output's top guess, the token, and the next token (-100 if there is none); its references are output and input.
    """

    rows: list[str]
    tokens: Tensor
    targets: Tensor
    reading: Reading

    @property
    def guesses(self) -> Tensor:
        """The top guess of each row, [R, N]."""
        return self.reading.top_ids[..., 0]

    @property
    def right(self) -> Tensor:
        """True if the model's guess is the next token, [N]."""
        return self.guesses[-1] == self.targets

    @property
    def probabilities(self) -> Tensor:
        """Probabilities of the top guesses, [R, N, k]."""
        return (self.reading.top_logits - self.reading.lse[..., None]).exp()

    @property
    def losses(self) -> Tensor:
        """Cross-entropy of each row with the next token in nats, [R, N]; NaN if there is none."""
        return self.reading.lse - self.reading.logits[..., NEXT]

    @property
    def commitment(self) -> Tensor:
        """The first row from which on every top guess is the output's, [N]: 0 is the input, R - 1 the output."""
        settled_RN = (self.reading.ranks[..., FINAL] == 1).long()
        return len(self.rows) - settled_RN.flip(0).cumprod(0).sum(0)


@torch.no_grad()
def run_lens(
    vocab: VocabParallelEmbedding,
    run: Callable[..., Tensor],
    body: nn.Module,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    method: Method,
    *,
    starts_BT: Tensor | None = None,
    window: slice = slice(None),
    k: int = 5,
    tokens: str = "replicated",
    memory_mib: float = 256,
) -> LensResult:
    """Measures every position in `window` of these sequences.

    `run`: the engine's wrapper of the `body`, or the body itself; called once. `tokens`: "replicated" if every rank
    passes the same tokens, or "distinct". Memory: the hidden states of R rows, [R, B, T, D], for a moment twice those
    of the window; and at most `memory_mib` for logits and for states sent to other ranks.
    Collectives: those of the lookup, the engine and `Readout.read`.
    """
    with Recorder(body, method, window) as recorder:
        run(vocab.lookup(tokens_BT, max_tokens_per_rank=tokens_BT.numel()), starts_BT)
    hidden_RND = recorder.taken()
    tokens_N, targets_N = tokens_BT[:, window].flatten(), targets_BT[:, window].flatten()
    readout = Readout(
        vocab.output_weight,
        shard=vocab.shard,
        group=vocab.group,
        softcap=vocab.config.softcap,
        tokens=tokens,  # type: ignore[arg-type]  # checked there
        memory_mib=memory_mib,
    )
    final_N1 = readout.top_k(hidden_RND[-1], 1)[1]
    reading = readout.read(
        hidden_RND,
        k=k,
        ids_NJ=torch.cat([final_N1, tokens_N[:, None], targets_N[:, None]], 1),
        reference_RND=torch.stack([hidden_RND[-1], hidden_RND[0]]),  # a list of indices would be copied to the device
    )
    reading.ranks[-1, :, FINAL] = 1  # by definition: two passes may differ by an ulp, which can swap two guesses
    return LensResult(recorder.names, tokens_N, targets_N, reading)
