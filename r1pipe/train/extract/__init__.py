"""What is got out of a teacher for distillation: `stage.extract`, one file for each way."""
