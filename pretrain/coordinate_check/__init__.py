"""Coordinate check: do activations keep their size while the width grows?"""
