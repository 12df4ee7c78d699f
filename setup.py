"""Answer `pip install .` in one line: this is a checkout to run from."""

raise SystemExit(
    "synco is a checkout to run from, not a package: run `pip install -r requirements.txt` and "
    "then, "
    "in this folder, `python main_pretrain.py --help`."
)
