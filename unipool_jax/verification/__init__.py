"""Step verification: steps of an answer are proved one by one, and the best of N answers is chosen by the outcome."""
