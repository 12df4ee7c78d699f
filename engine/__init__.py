"""How any model trains; knows no method and no data set."""
