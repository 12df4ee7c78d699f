"""The parts of a detector: trunks under necks, proposals, RoI heads and their cascade."""
