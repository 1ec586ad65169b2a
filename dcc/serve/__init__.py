"""The denoiser that runs a plan: position, schedule, state."""
