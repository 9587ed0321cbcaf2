"""The pocket teacher: a DeepSeek-V3 small enough to ship. Its worked chains, its chat template and its weights.

benchmarks/pocket/ holds the scripts that made it.
"""
