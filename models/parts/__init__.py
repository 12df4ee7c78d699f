"""What methods are made of: backbones, heads, losses, momentum pairs, queues, synthetic negatives."""
