"""Peers' token files, to and from ours: `python -m data_prep.formats --help`."""
