"""Short scripts of other libraries, as their documentation writes them, for `start`."""
