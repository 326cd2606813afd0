"""What comes out: explanations and comparisons, saved and read again, and their summary."""
