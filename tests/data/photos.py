"""A picture with smooth areas and edges, for tests that need one like a photograph."""

import numpy as np


def draw_photo(height: int, width: int, seed: int) -> np.ndarray:
    """Return a photo-like uint8 (H,W,3) image: shapes, soft waves, muted colours, a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    image = np.full((height, width, 3), rng.uniform(0.35, 0.65))
    for _ in range(6):
        fx, fy, phase = rng.uniform(-9, 9), rng.uniform(-9, 9), rng.uniform(0, 6)
        image += 0.06 * rng.normal() * np.sin(6 * (fx * x + fy * y) + phase)[..., None]
    for _ in range(5):
        cx, cy, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.05, 0.25)
        inside = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
        image[inside] += rng.uniform(-0.25, 0.25) + 0.05 * rng.normal(size=3)
    image += 0.05 * rng.normal(size=3) * x[..., None] + rng.normal(
        scale=0.01, size=(height, width, 1)
    )
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)
