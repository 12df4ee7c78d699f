"""Speed of what happens to images before they reach the network: list, decode, augment."""
