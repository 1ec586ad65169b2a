"""The denoiser that runs a plan: the position of each call, the schedule, and the state."""
