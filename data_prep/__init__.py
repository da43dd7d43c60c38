"""Turns raw text into memory-mapped token files. Needs numpy, tiktoken and datasets, but no torch."""

from data_prep.terminal import begin_if_command

begin_if_command()
