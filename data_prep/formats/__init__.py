"""Converts the token files of other programs to ours and back: `python -m data_prep.formats --help`."""
