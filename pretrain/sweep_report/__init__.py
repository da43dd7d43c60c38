"""The runs of a sweep on one page: what differs, losses against settings and tokens, a scaling law."""
