"""Transfer to object detection: through torchvision on any device, or through Detectron2."""
