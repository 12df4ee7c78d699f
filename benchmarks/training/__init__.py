"""Speed of training steps and evaluation, also beside other libraries."""
