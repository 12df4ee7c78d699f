"""Transfer to object detection: a route on torchvision that runs anywhere, and one through Detectron2."""
