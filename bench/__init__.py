"""Speed and memory beside the peers, as pytest-benchmark suites: ``python -m pytest bench --size=full``."""
