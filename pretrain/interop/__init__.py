"""Hugging Face in and out."""

from .folder import HFModel
from .initial import check_initial, initialise, load_model, special_tokens, tokenizer_of

__all__ = ["HFModel", "check_initial", "initialise", "load_model", "special_tokens", "tokenizer_of"]
