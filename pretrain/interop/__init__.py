"""Hugging Face in and out."""

from .folder import HFModel
from .initial import check_initial, folder_of, initialise, load_model

__all__ = ["HFModel", "check_initial", "folder_of", "initialise", "load_model"]
