"""The families there are. Apart from `family.py` because each family's file builds on that one."""

from .family import Family
from .gpt2 import GPT2
from .llama import LLAMA

FAMILIES: dict[str, Family] = {family.name: family for family in (GPT2, LLAMA)}  # by model.family


def hugging_face_types() -> dict[str, Family]:
    """The family of each `model_type` that a config.json may have."""
    return {kind: family for family in FAMILIES.values() for kind in family.hugging_face.model_types}
