"""Arithmetic on weights: arrays in, arrays out. No paths, no URLs, no order of work."""
