"""The command line that the scripts share, and the line that ends the measurement."""

import argparse

DONE = "first step done, loss"


def parse(text: str | None) -> argparse.Namespace:
    """Return the folder of images, the size of a view and the batch."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("folder", help="of image folders, one a class")
    parser.add_argument("--size", type=int, required=True, help="of a view, in pixels")
    parser.add_argument("--batch", type=int, required=True, help="images a step")
    return parser.parse_args()
