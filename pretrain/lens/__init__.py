"""The logit lens: what each layer would guess. The names are in the modules: most of them need torch."""
