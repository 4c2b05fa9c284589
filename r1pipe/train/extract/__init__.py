"""What is extracted from a teacher for distillation: one file for each `stage.extract`."""
