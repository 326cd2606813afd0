"""Data sets with ground truth: synthetic scenes, and readers for real ones in COCO's format."""
