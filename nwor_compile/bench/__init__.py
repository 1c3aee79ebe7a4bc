"""Benchmarks behind `nwor bench`. Each compares with a baseline in the same run."""
