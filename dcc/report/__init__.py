"""What an evaluation measured, for people and for programs."""
