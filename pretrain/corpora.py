"""A run's view of its corpora: rows of the vocabulary, samples in order, windows for validation.

Not part of build.py, because launchers and tools use it without torch.
"""

import shutil

from .config.job import JobConfig
from .data import Data, Order, PackedWindows, Samples, Windows


def vocab_rows(config: JobConfig, data: Data) -> int:
    """Returns V: vocab.size, or the tokenizer's size if it is null."""
    size, needed = config.vocab.size, data.vocab_size
    if size is None and needed is None:
        raise ValueError("vocab.size=null must be given: the data has no tokenizer")
    if size is not None and needed is not None and size < needed:
        raise ValueError(f"vocab.size={size} must be at least {needed}, the rows of the tokenizer in {data.tokenizer}")
    rows = size if size is not None else needed
    assert rows is not None
    return rows


def samples(config: JobConfig, data: Data) -> Samples:
    """Returns the windows of the corpora, in the order of the run."""
    sources = {}
    for title, corpus in data.corpora.items():
        if config.data.packing == "best_fit":
            windows: Windows = PackedWindows(corpus.train, config.seq_len)
        else:
            windows = Windows(corpus.train, config.seq_len, masked=config.data.masked)
        if not len(windows):
            path = config.data.paths[title]
            raise ValueError(f"{config.data.key_of(title)}={path}: no document has two tokens to pack")
        sources[title] = windows, Order(len(windows), config.seed, corpus.name)
    return Samples(sources, data.blend, config.data.skip)


def validation_windows(config: JobConfig, data: Data) -> dict[str, Windows]:
    """Returns the windows of the validation splits, by title, for the corpora that have one."""
    windows = {t: Windows(c.val, config.seq_len, masked=config.data.masked) for t, c in data.corpora.items()}
    return {title: split for title, split in windows.items() if len(split)}


def share_of_node(local: int, group: int, world: int) -> float:
    """Returns an upper bound of the share of all samples that a node with `local` of `world` ranks reads: a rank reads
    those of its whole vocab group of `group` ranks.
    """
    whole = local % group == 0 or group % local == 0
    return min(1.0, (max(local, group) if whole else local + group) / world)


def check_room(config: JobConfig, data: Data, share: float) -> None:
    """Raises ValueError if data.cache has too little room on this node for what the run reads from stores.

    share: of all samples, those that this node reads. A window needs its blocks, but never more than the corpus.
    """
    counts = data.blend.counts(0, config.train.batches.samples_after(config.train.steps))
    needed, urls, folder = 0, [], None
    for (title, corpus), windows in zip(data.corpora.items(), counts, strict=True):
        if (cache := corpus.cache) is None:
            continue
        most = cache.missing
        if config.data.packing == "none":  # a packed window may have documents of many blocks
            most = min(most, max(0, cache.bytes_for(windows * share, config.seq_len) - (cache.size - cache.missing)))
        needed, folder = needed + most, cache.folder.parent
        urls.append(config.data.paths[title])
    if folder is not None and needed > (free := shutil.disk_usage(folder).free):
        raise ValueError(
            f"data.cache={folder} must have room for {needed / 2**30:.1f} GiB of {', '.join(urls)}, but has"
            f" {free / 2**30:.1f}: name a folder on a larger disk"
        )
