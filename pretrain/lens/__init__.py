"""The logit lens: what each layer would guess. Import from the modules: most of them need torch."""
