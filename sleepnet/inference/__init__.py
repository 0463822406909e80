"""Inference: a decoder, one session or many at once, and sessions that are saved."""
