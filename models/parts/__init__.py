"""Parts of methods: backbones, heads, losses, momentum pairs, queues, synthetic negatives."""
