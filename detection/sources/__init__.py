"""Detection data sets, read and checked: COCO and Pascal VOC."""
