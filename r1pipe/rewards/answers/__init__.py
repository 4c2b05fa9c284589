"""Final answers: what a gold answer is, where a response states one, and when the two are equal."""
