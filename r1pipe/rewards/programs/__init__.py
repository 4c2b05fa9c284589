"""Code tasks: test cases from public layouts, the program in a response, and its run in a sandbox."""
