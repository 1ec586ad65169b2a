"""Runs what is compiled, and remembers what the denoiser is called with."""
