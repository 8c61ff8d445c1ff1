"""`gcpo-t2i eval`: images of held-out prompts, their scores with intervals, and the recipe that the numbers were made with."""
