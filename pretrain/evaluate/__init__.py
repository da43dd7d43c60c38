"""Benchmarks in lm-eval's format, scored on the shards. Import from the modules: most of them need torch."""
