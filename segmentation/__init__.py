"""Semantic segmentation on a pretrained backbone."""
