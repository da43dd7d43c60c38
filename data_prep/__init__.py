"""From raw text to memory-mapped token files. Stands alone: numpy, tiktoken, datasets; no torch."""
