"""The logit lens: what each layer would guess."""

from .lens import Look, Method, look

__all__ = ["Look", "Method", "look"]
