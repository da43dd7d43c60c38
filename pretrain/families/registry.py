"""Registry of model families. Separate from `family.py` because the families' files import that one."""

from .family import Family
from .gpt2 import GPT2
from .llama import LLAMA

FAMILIES: dict[str, Family] = {family.name: family for family in (GPT2, LLAMA)}  # by model.family


def hugging_face_types() -> dict[str, Family]:
    """Returns the family of each supported `model_type` of config.json."""
    return {kind: family for family in FAMILIES.values() for kind in family.hugging_face.model_types}
