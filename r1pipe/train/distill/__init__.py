"""How a teacher's output is put into a student: by divergence, by ranking, or as advantages."""
