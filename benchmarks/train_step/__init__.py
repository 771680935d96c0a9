"""The folder of one benchmark, which `python benchmarks/train_step` runs; __main__.py says what it measures."""
