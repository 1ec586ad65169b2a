"""What a calibration measures, and the profile that keeps it."""
