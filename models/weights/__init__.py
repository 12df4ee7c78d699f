"""Weights of backbones and of whole pretraining states: load, name, export."""
