"""Measurements of the two packages. Nothing imports this package."""
