"""Hugging Face in and out. The names are in the modules: most of them need torch."""
