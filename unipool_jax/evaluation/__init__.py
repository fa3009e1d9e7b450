"""What a checkpoint is worth: loss on text, zero-shot tasks, generated text."""
