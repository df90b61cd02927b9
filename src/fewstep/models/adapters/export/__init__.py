"""From a student to a folder or a LoRA file that other tools read."""
