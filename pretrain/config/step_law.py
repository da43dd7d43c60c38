"""Learning rate and batch size from the model and the tokens of the run, where the settings give none.

Step Law (Li et al., arXiv:2503.04715, section 1): AdamW's best learning rate and batch size for models of 60M to 1B
parameters on 2B to 100B tokens. N is the number of parameters without the vocabulary, D the number of tokens.
Muon takes AdamW's learning rate. Not part of optim.py, because the batch size is a setting of train.
"""

LARGEST_LR = 2e-3  # the largest that was tried here with AdamW; the law exceeds it for small models
SMALLEST_BATCH = 32  # sequences; a smaller batch would not divide among eight ranks


def learning_rate(parameters: int, tokens: int) -> float:
    """Peak learning rate, 1.79 · N^-0.713 · D^0.307, to two digits; at most LARGEST_LR."""
    return float(f"{min(LARGEST_LR, 1.79 * parameters**-0.713 * tokens**0.307):.2g}")


def batch_for_tokens(tokens: int, seq_len: int) -> int:
    """Sequences per step for a run of `tokens` tokens: 0.58 · D^0.571 tokens, as a power of two."""
    return _power_of_two(0.58 * tokens**0.571 / seq_len)


def batch_for_steps(steps: int, seq_len: int) -> int:
    """Sequences per step for a run of `steps` steps. D is then steps · B, which is solved for the batch size B."""
    return _power_of_two((0.58 * steps**0.571) ** (1 / (1 - 0.571)) / seq_len)


def _power_of_two(sequences: float) -> int:
    """The nearest power of two, at least SMALLEST_BATCH."""
    size = SMALLEST_BATCH
    while size * 2**0.5 < sequences:
        size *= 2
    return size
