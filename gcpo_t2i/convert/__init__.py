"""Published checkpoints, in their authors' own layouts, made into policy folders."""
