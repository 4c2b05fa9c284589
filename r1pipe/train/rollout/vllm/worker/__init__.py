"""Modules that vLLM's environment imports from this folder, by their own names; none may import r1pipe."""
