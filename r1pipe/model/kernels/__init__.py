"""Our own kernels. cpu/: C++ for processors with AVX-512 or AVX2, compiled at the first use. They must match
torch's operators in r1pipe/model, which run everywhere else.
"""
