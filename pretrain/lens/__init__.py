"""The logit lens: what each layer would guess."""

from .lens import LensResult, Method, run_lens

__all__ = ["LensResult", "Method", "run_lens"]
