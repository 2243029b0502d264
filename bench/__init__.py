"""The measuring contract: ``python -m bench step|data|infer [--json FILE]``, see bench/common.py."""
