"""Trains a byte-level BPE with Hugging Face's `tokenizers`, for use by tiktoken."""

from collections.abc import Iterable, Iterator
from hashlib import blake2b

from data_prep.errors import DataError, headline
from data_prep.tokenizer_spec import END_OF_DOCUMENT, TokenizerSpec

SMALLEST_VOCAB = 257
PIECE_CHARACTERS = 1 << 16  # the sample is made of pieces, so that one huge document is sampled too

# Patterns that split a text before merging, written for both engines: tiktoken's and Oniguruma.
PATTERNS = {
    "cl100k": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


def train_bpe(
    texts: Iterable[str], vocab_size: int, pattern: str, sample_bytes: int, within_bytes: int
) -> TokenizerSpec:
    """Trains a BPE of at most `vocab_size` rows, the last one <|endoftext|>; fewer if the sample has no more pairs.

    The same texts always give the same tokenizer. Raises DataError without any text, or if the pattern is invalid.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    sample = even_sample(texts, sample_bytes, within_bytes)
    if not sample:
        raise DataError("the corpus has no training text to train the tokenizer on")
    tokenizer = Tokenizer(models.BPE())
    try:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"tokenizer.pattern={pattern!r} must be a regular expression: {headline(error)}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    byte_of = {character: byte for byte, character in characters().items()}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in tokenizer.get_vocab().items()}
    return TokenizerSpec("bpe", pattern, {END_OF_DOCUMENT: len(ranks)}, ranks)


def even_sample(texts: Iterable[str], sample_bytes: int, within_bytes: int) -> list[str]:
    """Samples at most `sample_bytes` of the first `within_bytes` of text, in order; always the same pieces.

    A piece stays while its hash is below a threshold. The threshold halves whenever the sample has grown too large.
    So one pass samples evenly from a corpus of any length, and holds only the sample.
    """
    threshold, kept_bytes, seen_bytes = 1 << 64, 0, 0
    kept: list[tuple[int, int, str]] = []
    for piece in _pieces(texts):
        data = piece.encode()
        seen_bytes += len(data)
        key = int.from_bytes(blake2b(data, digest_size=8, person=b"bpe sample").digest())
        if key < threshold:
            kept.append((key, len(data), piece))
            kept_bytes += len(data)
        while kept_bytes > sample_bytes and len(kept) > 1:
            threshold //= 2
            kept = [item for item in kept if item[0] < threshold] or kept[:1]
            kept_bytes = sum(item[1] for item in kept)
        if seen_bytes >= within_bytes:
            break
    return [piece for _, _, piece in kept]


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), PIECE_CHARACTERS):
            yield text[start : start + PIECE_CHARACTERS]


def characters() -> dict[int, str]:
    """GPT-2's table of bytes as characters: printable bytes stay, the others take the code points from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
