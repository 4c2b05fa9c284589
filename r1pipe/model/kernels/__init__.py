"""Kernels of our own. cpu/: C++ for processors with AVX-512, compiled at the first use; torch's operators, in
r1pipe/model, are what they must match, and do the work elsewhere.
"""
