"""How features are judged: accuracy, k-NN, few labels, probes, retrieval, propagation."""
