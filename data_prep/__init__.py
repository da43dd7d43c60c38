"""From raw text to memory-mapped token files. Stands alone: numpy, tiktoken, datasets; no torch."""

from data_prep.terminal import begin_if_command

begin_if_command()
