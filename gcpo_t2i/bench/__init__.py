"""`gcpo-t2i bench`: what a rollout, an update and a step cost here, against other ways and against the memory's speed."""
