"""Read the layouts of segmentation data sets."""
