"""Parts of main_pretrain.py: `--dry-run`, and what is measured between epochs."""
