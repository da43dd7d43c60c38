"""Keys and values of earlier positions, so that a forward reads only new tokens. Not part of attention.py: training
needs none of it.

B sequences, K key/value heads of size d, C slots per sequence. Position i of a sequence is in slot i, so sequences of
several lengths need no padding at their left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of all blocks for B sequences: 2 · blocks · B · K · C · d numbers, made at the first forward."""

    def __init__(self, blocks: int, sequences: int, slots: int, device: torch.device) -> None:
        self.sequences, self.slots, self.device = sequences, slots, device
        self.blocks = [BlockCache() for _ in range(blocks)]

    def whole(self, longest: int) -> "NewTokens":
        """Prepares a forward of all sequences from their first position, padded to `longest`."""
        return self._new(torch.arange(longest, device=self.device).expand(self.sequences, -1))

    def next(self, positions: list[int]) -> "NewTokens":
        """Prepares a forward of one new token of each sequence, at these positions."""
        positions_B1, filled = torch.tensor(positions, device=self.device)[:, None], max(positions) + 1
        if min(positions) + 1 == filled:
            return self._new(positions_B1, filled)
        seen_BC = torch.arange(filled, device=self.device) <= positions_B1
        return self._new(positions_B1, filled, seen_BC[:, None, None])

    def keep(self, rows: list[int]) -> None:
        """Drops all other sequences; the kept ones are renumbered in this order."""
        self.sequences = len(rows)
        for block in self.blocks:
            block.keep(rows)

    def _new(self, positions_BT: Tensor, filled: int = 0, seen_B11C: Tensor | None = None) -> "NewTokens":
        blocks = [NewOfBlock(block, self.slots, positions_BT, filled, seen_B11C) for block in self.blocks]
        return NewTokens(positions_BT, blocks)


class BlockCache:
    """Keys and values of one block, [B, K, C, d] each."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def keep(self, rows: list[int]) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def tensors(self, slots: int, like_BKTd: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            sequences, heads, _, size = like_BKTd.shape
            self.keys, self.values = like_BKTd.new_zeros(2, sequences, heads, slots, size)
        return self.keys, self.values


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of one forward: their positions, and the cache of each block."""

    positions_BT: Tensor
    blocks: list["NewOfBlock"]


@dataclass(frozen=True)
class NewOfBlock:
    """The new tokens of one forward in one block. `attention` takes it as a mask."""

    cache: BlockCache
    slots: int
    positions_BT: Tensor
    filled: int  # slots that the longest sequence fills, with its new token; 0: whole sequences, causal
    seen_B11C: Tensor | None  # slots that the new token attends to; None: all that are filled

    def extended(self, keys_BKTd: Tensor, values_BKTd: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values. Returns the keys and values to attend with."""
        keys, values = self.cache.tensors(self.slots, keys_BKTd)
        if self.filled == 0:
            keys[:, :, : keys_BKTd.shape[2]], values[:, :, : keys_BKTd.shape[2]] = keys_BKTd, values_BKTd
            return keys_BKTd, values_BKTd
        if self.seen_B11C is None:
            keys[:, :, self.filled - 1], values[:, :, self.filled - 1] = keys_BKTd[:, :, 0], values_BKTd[:, :, 0]
        else:
            rows, slots_B = torch.arange(len(keys), device=keys.device), self.positions_BT[:, 0]
            keys[rows, :, slots_B], values[rows, :, slots_B] = keys_BKTd[:, :, 0], values_BKTd[:, :, 0]
        return keys[:, :, : self.filled], values[:, :, : self.filled]
