"""Model families without their bodies: settings, tensor names in Hugging Face files, footprint."""

from .family import Activations, Family, HuggingFace, ModelConfig, WeightMapping
from .registry import FAMILIES, hugging_face_types

__all__ = ["FAMILIES", "Activations", "Family", "HuggingFace", "ModelConfig", "WeightMapping", "hugging_face_types"]
