"""Model families as everything but their bodies sees them: settings, names in Hugging Face's files, footprint."""

from .family import Activations, Family, HuggingFace, ModelConfig, WeightMapping
from .registry import FAMILIES, hugging_face_types

__all__ = ["FAMILIES", "Activations", "Family", "HuggingFace", "ModelConfig", "WeightMapping", "hugging_face_types"]
